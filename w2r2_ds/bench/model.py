"""Model, training step and batches of the benchmarks, with random weights and inputs.

Uses the classes of training (`W2R2Step`, `Collator`, `W2R2`), so that benchmarks measure the code that trains.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from w2r2_ds.bench.shapes import PATCH, Shape
from w2r2_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from w2r2_ds.data.answer_tokens import find_answer_tokens, token_tables
from w2r2_ds.data.batching.collate import Collator
from w2r2_ds.data.batching.packing import Grouping, groups_by_frames
from w2r2_ds.data.loader import make_position_ids
from w2r2_ds.data.processor import IMAGE, Features
from w2r2_ds.data.visual_inputs import VisualInputs
from w2r2_ds.demo.tiny_models import IMAGE_MEAN, IMAGE_STD, make_config, train_tokenizer
from w2r2_ds.kernels.bind import bind_kernels
from w2r2_ds.kernels.candidates import Shapes
from w2r2_ds.kernels.measure import select_kernels
from w2r2_ds.kernels.select import Kernels, resolve_attention, resolve_dtype
from w2r2_ds.models.attention.sdpa_backends import disable_cudnn_sdpa
from w2r2_ds.models.build import VlmFrontend, trainable
from w2r2_ds.models.family import find_family
from w2r2_ds.models.fusion import make_fusion
from w2r2_ds.models.lora import add_lora
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.vggt.encoder import VGGTEncoder, spec_of
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.models.weights.loading import meta_model
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.sample import Sample, Target

SEED = 0
BOX = np.array([0.4, 3.0, 0.8, 1.2, 0.9, 1.6, 0.0, 0.0, 0.0])
QUESTION = " find the chair"


class CroppedVGGT(VGGTEncoder):
    """VGGT that returns the features of the upper left part of every frame.

    In the benchmark shapes the VLM encodes only that part of a frame; see `shapes.py`.

    Args:
        vggt: encodes whole frames.
        layer: index of the layer whose features are returned.
        grid: number of columns and rows of patches to return.
    """

    def __init__(self, vggt: VGGT, layer: int, grid: tuple[int, int]) -> None:
        super().__init__(vggt, [layer])
        self.grid = grid

    def encode(self, images: Tensor) -> Tensor:
        """Features ``[frames, rows, columns, channels]`` of images ``[frames, 3, height, width]``."""
        return self.crop(super().encode(images))

    def crop(self, features: Tensor) -> Tensor:
        """Upper left part ``[frames, rows, columns, channels]`` of features ``[frames, h, w, channels]``."""
        columns, rows = self.grid
        return features[:, :rows, :columns]


@dataclass
class Subject:
    """Model under test, with the tokenizer and the batches for it.

    Attributes:
        shape: sizes of the model and of a sample.
        model: VLM with LoRA, merger and VGGT with random weights, also in `lora_B`, which training initialises to zero.
        frontend: tokenizer and vision spec of the VLM.
        device: device of the model and of batches.
    """

    shape: Shape
    model: W2R2
    frontend: VlmFrontend
    device: torch.device

    def step(self, push: str = "margin", **objective: Any) -> W2R2Step:
        """Build a training step with the push term `push` and further fields of `ObjectiveConfig`.

        All steps of a subject share its model.
        """
        config = RunConfig(objective=ObjectiveConfig(push_term={"name": push}, **objective))
        tables = token_tables(self.frontend.tokenizer, self.shape.vocabulary).to(self.device)
        return W2R2Step(self.model, config, Scorer(tables, self.frontend.tokenizer, config.objective)).train()

    def batch(self, questions: int = 1, packed: bool = False) -> Batch:
        """Build a batch of questions about one frame set: a sequence per question, or one packed sequence."""
        return self._collate(self.features(questions), groups_by_frames if packed else None)

    def single(self, question: int) -> Batch:
        """Build a batch of one question of `batch`, by its index."""
        return self._collate(self.features(question + 1)[question:], None)

    def _collate(self, features: list[Features], grouping: Grouping | None) -> Batch:
        frontend = self.frontend
        positions, pad = make_position_ids(frontend, DataConfig()), frontend.tokenizer.pad_token_id
        collate = Collator(
            pad, "image", positions, frontend.vision, frontend.geometry, frontend.family, grouping=grouping
        )
        return collate(features).to(self.device)

    def features(self, questions: int) -> list[Features]:
        """Processed samples, as `data/processor.py` returns them: questions about one frame set, which is noise."""
        shape, vision = self.shape, self.frontend.vision
        width, height = shape.frame_size
        noise = np.random.default_rng(SEED)
        frames = torch.from_numpy(noise.integers(0, 256, (shape.frames, 3, height, width), dtype=np.uint8))
        rows, columns = shape.grid[1] * PATCH, shape.grid[0] * PATCH
        cropped = frames[:, :, :rows, :columns].contiguous()
        grid_thw = self.frontend.family.grid_thw(shape.frames, rows, columns, vision, "image")
        features = []
        for index in range(questions):
            ids, answer = self._tokens(index)
            types = torch.where(ids == vision.image_token_id, IMAGE, 0)
            sample = self._sample(index, answer)
            offsets = self.frontend.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
            end = (len(answer), len(answer) + 1)  # <|im_end|>
            features.append(
                Features(
                    sample=sample,
                    input_ids=ids,
                    token_types=types,
                    num_answer_tokens=shape.answer_tokens,
                    visual=VisualInputs(cropped, grid_thw, frames),
                    what=torch.zeros(len(ids), dtype=torch.bool),
                    answer_tokens=find_answer_tokens("grounding", answer, [*offsets["offset_mapping"], end]),
                )
            )
        return features

    def _tokens(self, question: int) -> tuple[Tensor, str]:
        """Token ids ``[tokens]`` of a sample (frames with start and end tokens, question, answer), and its answer."""
        shape, tokenizer, vision = self.shape, self.frontend.tokenizer, self.frontend.vision
        pads = [vision.image_token_id] * (shape.visual_tokens // shape.frames)
        end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        frames = [vision.vision_start_id, *pads, end] * shape.frames
        length = shape.prompt_tokens - 2 * shape.frames
        words = tokenizer(QUESTION * length, add_special_tokens=False)["input_ids"]
        prompt = words[question % len(words) :][:length]  # every question starts at another word
        answer, answer_ids = make_answer(tokenizer, shape.answer_tokens - 1, question)
        ids = [*frames, *prompt, *answer_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert len(ids) == shape.tokens, "a sample has as many tokens as the shape"
        return torch.tensor(ids), answer

    def _sample(self, index: int, answer: str) -> Sample:
        frames = self.shape.frames
        poses = np.tile(np.eye(4), (frames, 1, 1))
        target = Target(BOX, 1, "chair", "unique")
        paths = tuple(f"frame{i}.jpg" for i in range(frames))  # not read: the features are noise
        return Sample(f"bench|{index}", "scanrefer", "bench", paths, poses, QUESTION, answer, target)  # type: ignore[arg-type]


def make_answer(tokenizer: Any, tokens: int, seed: int) -> tuple[str, list[int]]:
    """Make a grounding answer of exactly `tokens` tokens; returns its text and its token ids."""
    digits = np.random.default_rng(seed).integers(1, 10, 400)
    # Lengthen the numbers in turn, decimal by decimal, until the answer has the right length. A decimal with its point
    # may be two tokens; odd attempts add a single leading digit.
    for extra in range(200):
        values = [str(digits[i]) for i in range(9)]
        for decimal in range(extra // 2):
            index = decimal % 9
            values[index] += ("." if "." not in values[index] else "") + str(digits[9 + decimal])
        if extra % 2:
            values[8] = "1" + values[8]
        answer = f'{{"frame": 0, "bbox_3d": [{", ".join(values)}]}}'
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) == tokens:
            return answer, ids
    raise AssertionError(f"no answer has {tokens} tokens")


def build(
    shape: Shape,
    device: torch.device,
    kernels: Kernels | None = None,
    fusion: str = "add",
    zero_geometry: str = "merged",
    lora_dropout: float = 0.0,
) -> Subject:
    """Build a model with random weights, with activation checkpointing as in training.

    Args:
        shape: sizes of the model.
        device: device of the model.
        kernels: names of kernels; None selects them as `model.kernels` auto does.
        fusion, zero_geometry, lora_dropout: as in `ModelConfig`.
    """
    dtype = resolve_dtype(shape.dtype)
    if kernels is None:
        shapes = Shapes(shape.hidden, shape.intermediate, shape.lora_rank, lora_dropout, dtype)
        kernels = select_kernels("auto", lambda: shapes, device)
    frontend = build_frontend(shape)
    torch.manual_seed(SEED)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            vlm = Qwen2_5_VLForConditionalGeneration(frontend.meta.config)
            merger = GeometryMerger(2 * shape.vggt.embed_dim, shape.hidden, shape.merger_hidden)
            phi = make_fusion(fusion, shape.hidden)
            vggt = VGGT(shape.vggt)
        finally:
            torch.set_default_dtype(torch.float32)
    vlm.set_attn_implementation(resolve_attention("auto", dtype))
    disable_cudnn_sdpa()  # as `load_vlm`
    frontend.family.speed_up_tower(vlm)
    peft = add_lora(vlm, shape.lora_rank, 2 * shape.lora_rank, lora_dropout)
    bind_kernels(frontend.family.language_model(vlm), kernels)
    geometry = CroppedVGGT(vggt, shape.geometry_layer, shape.grid)
    model = W2R2(peft, merger, phi, geometry, zero_geometry, kernels)
    with torch.no_grad():
        # `lora_B` and biases are initialised to zero, which would hide errors: the gradient of `lora_A` would be zero,
        # and the merger's output for zero features too.
        for parameter in trainable(model).values():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    recompute(model.family.language_model(model.base).layers, 1, False, lambda: (nullcontext(), nullcontext()))
    model.base.enable_input_require_grads()
    return Subject(shape, model, frontend, device)


def build_frontend(shape: Shape) -> VlmFrontend:
    """Build the tokenizer, vision spec and meta model of a shape's VLM, without weights."""
    answers = [f'{{"frame": {i}, "bbox_3d": [{i}.0, 1, 2, 3, 4, 5, 6, 7, 8]}}' for i in range(9)]
    tokenizer = train_tokenizer([QUESTION * 2, *answers], 400)
    config = make_config(
        tokenizer,
        text={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
        },
        vision={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "window_size": shape.vision_window,
            "fullatt_block_indexes": list(shape.vision_full),
        },
        tied=shape.tied,
        dtype=shape.dtype,
    )
    normalization = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    vision = find_family(config.model_type).vision_spec(config, normalization, "benchmark")
    return VlmFrontend(tokenizer, vision, meta_model(config), spec_of(shape.vggt, [shape.geometry_layer]))


def bench_optimizer(model: W2R2) -> torch.optim.Optimizer:
    """Build AdamW over the trained parameters, with a learning rate so low that the losses stay the same."""
    return torch.optim.AdamW(trainable(model).values(), lr=1e-7)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Run the backward pass, gradient clipping and the optimizer step, as DeepSpeed and the HF Trainer do."""
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def shape_description(shape: Shape) -> str:
    """One sentence about a shape, for the notes of a report."""
    vggt = shape.vggt
    return (
        f"{shape.name}: language model {shape.layers} layers of {shape.hidden} ({shape.heads}/{shape.kv_heads} heads, "
        f"MLP {shape.intermediate}), vocabulary {shape.vocabulary}, {shape.visual_tokens} visual and "
        f"{shape.tokens - shape.visual_tokens} text tokens ({shape.answer_tokens} of the answer), LoRA rank "
        f"{shape.lora_rank}, {shape.dtype}; vision tower {shape.vision_depth} x {shape.vision_hidden}; VGGT width "
        f"{vggt.embed_dim}, {vggt.vit_depth} + {vggt.depth} + {vggt.depth} blocks, {shape.frames} frames of "
        f"{shape.frame_size[0]}x{shape.frame_size[1]}, layer {shape.geometry_layer} of {vggt.depth} is used."
    )
