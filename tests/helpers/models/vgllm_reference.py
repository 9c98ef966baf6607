"""Build model and batch of a recorded VG-LLM run, and compute all recorded outputs with this package.

For tests/convert/test_from_vgllm_golden.py. The loss is computed twice: from the logits and by `W2R2Step`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from encoder_inputs import pixel_values
from golden_files import Golden
from objectives import objective_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.convert.from_vgllm import fill, split_state, vggt_config, vgllm_name
from w2r2_ds.data.answer_tokens import MAX_NUMBERS, TokenTables
from w2r2_ds.data.batching.collate import token_counts
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.fusion import make_fusion
from w2r2_ds.models.merger import GeometryMerger, split_cells
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.models.qwen2_5_vl.vision_inputs import WindowInputs
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.models.weights.loading import model_class
from w2r2_ds.objective.loss import sample_weights
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import AnswerPositions, Batch, DescriptionPositions, Layout, Visuals
from w2r2_ds.types.vision import VisionSpec

MAIN = ""
VARIANTS = {
    MAIN: ("first", "merged", "fused"),
    "ref_last": ("last", "merged", "fused"),
    "geometry_output_zero": ("first", "merged", "zero"),
    "geometry_input_zero": ("first", "features", "zero"),
}
"""Variant in the golden files -> reference frame, `model.zero_geometry`, and pass (``fused``, ``zero``)."""


def state_of(golden: Golden) -> dict[str, torch.Tensor]:
    """The recorded state dict."""
    return {key.removeprefix("param/"): value for key, value in golden.tensors.items() if key.startswith("param/")}


@cache
def model_of(golden: Golden, reference_frame: str, zero: str) -> W2R2:
    """The recorded model; language model and merger are trainable, as in VG-LLM."""
    recorded, parts = golden.record["config"], split_state(state_of(golden))
    config = CONFIG_MAPPING["qwen2_5_vl"].from_dict({**recorded["text"], "vision_config": recorded["vision"]})
    vlm = model_class(config)(config)
    vggt = VGGT(dataclasses.replace(vggt_config(parts["vggt"]), **recorded["vggt"]))
    merge, hidden = config.vision_config.spatial_merge_size, config.text_config.hidden_size
    merger = GeometryMerger(2 * vggt.config.embed_dim, hidden, recorded["merger_hidden"], merge)
    for part, module in (("vlm", vlm), ("vggt", vggt), ("geometry_merger", merger)):
        fill(module, part, parts[part])
    vlm.model.visual.requires_grad_(False)
    layer = vggt.config.depth - 2
    encoder = VGGTEncoder(vggt, [layer], reference_frame)
    return W2R2(vlm, merger, make_fusion("add", hidden), encoder, zero).eval()


@cache
def batch_of(golden: Golden) -> Batch:
    """The recorded inputs as a training batch. All supervised tokens are answer tokens; none are digit tokens."""
    tensors, count = golden.tensors, len(golden.record["samples"])
    ids, mask, labels = (tensors[f"in/{name}"] for name in ("input_ids", "attention_mask", "labels"))
    types = (ids == golden.record["config"]["text"]["image_token_id"]).long()
    grid = tensors["in/image_grid_thw"]
    images = [tensors[f"in/images_vggt_{index}"] for index in range(count)]
    frames = tuple((values * 255).round().to(torch.uint8) for values in images)
    assert all(torch.equal(unit_range(one), other) for one, other in zip(frames, images, strict=True))
    base = model_of(golden, *VARIANTS[MAIN][:2]).base
    sample, position = (labels[:, 1:] != -100).nonzero().unbind(1)
    vision = base.config.vision_config
    sizes = token_counts(grid, vision.spatial_merge_size)
    tower = WindowInputs.of(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    spec = VisionSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        window_size=vision.window_size,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
        image_token_id=base.config.image_token_id,
        video_token_id=base.config.video_token_id,
        vision_start_id=base.config.vision_start_token_id,
        tokens_per_second=vision.tokens_per_second,
    )
    visuals = Visuals("image", grid, sizes, tower, spec, frames, frames)
    assert torch.equal(pixel_values(visuals), tensors["in/pixel_values"]), "the recorded input of the vision tower"
    digits = torch.full((count, MAX_NUMBERS, 1), -1)
    return Batch(
        ids=tuple(map(str, range(count))),
        tasks=("scan2cap",) * count,
        input_ids=ids,
        attention_mask=mask,
        token_types=types,
        position_ids=Qwen25VL().position_ids(base, ids, types, mask, {"image": grid}, seconds_per_grid=1.0),
        visuals=visuals,
        visual_tokens=types.flatten().nonzero().squeeze(-1),
        frame_set_of_token=types.nonzero()[:, 0],
        frame_set_of_sample=torch.arange(count),
        layout=Layout(mask - 1, torch.zeros_like(mask), tuple(((0, length),) for length in mask.sum(-1).tolist())),
        optional_answer_positions=AnswerPositions(
            sample=sample,
            sequence=sample,
            position=position,
            label=labels[sample, position + 1],
            where=torch.ones_like(sample, dtype=torch.bool),
            digit=digits,
            place_value=torch.zeros_like(digits, dtype=torch.float64),
            sign=torch.zeros_like(digits[..., 0]),
            in_world=torch.zeros(count, dtype=torch.bool),
        ),
        cam_to_world=torch.full((count, 1, 4, 4), torch.nan, dtype=torch.float64),
        target_box=torch.full((count, 9), torch.nan, dtype=torch.float64),
        optional_description_positions=DescriptionPositions(sample[:0], sample[:0], position[:0]),
        kinds=("caption",) * count,
        box_formats=("camera",) * count,
        answers=("",) * count,
    )


def grid_of(golden: Golden, index: int) -> tuple[int, ...]:
    """Frames, rows and columns of merged patches, and rows and columns of patches per merged patch."""
    vision, sample = golden.record["config"]["vision"], golden.record["samples"][index]
    merge = vision["spatial_merge_size"]
    return (sample["frames"], *(side // (vision["patch_size"] * merge) for side in sample["hw"]), merge, merge)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Record the arguments of each call of `module` in the block, as index or keyword -> value."""
    calls: list[dict[str, Any]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**dict(enumerate(args)), **kwargs}), with_kwargs=True
    )
    yield calls
    handle.remove()


def forward(golden: Golden, variant: str) -> dict[str, torch.Tensor]:
    """All outputs of a variant that a golden file may have, with autograd graph."""
    reference_frame, zero, geometry = VARIANTS[variant]
    model, batch = model_of(golden, reference_frame, zero), batch_of(golden)
    features = model.encode_3d(batch.visuals)
    visual = model.encode_2d(batch.visuals)
    result = {f"geometry_features_{i}": f.flatten(1, 2) for i, f in enumerate(features)}
    with inputs_of(model.geometry_merger.ln_q) as cells:
        merged = model.merge(features) if geometry == "fused" else model.zero_geometry_tokens(features)
    if merged is not None:
        result["geometry_embeds"] = merged
        shapes = [grid_of(golden, index) for index in range(len(features))]
        grids = [grid for call in cells for grid in call[0]]  # one per sample
        patches = torch.cat([split_cells(grid, model.geometry_merger.merge_size).flatten(0, 4) for grid in grids])
        for index, part in enumerate(patches.split([math.prod(shape) for shape in shapes])):
            result[f"merger_in_{index}"] = part.unflatten(0, shapes[index])
    with inputs_of(model.base.model.language_model) as calls:
        result["logits"] = model.base(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            mm_encoder_outputs={"image": model.fuse(visual, merged)},
            use_cache=False,
        ).logits
    result["visual_embeds"] = torch.cat(visual.pooler_output)
    result["inputs_embeds"] = calls[0]["inputs_embeds"]
    result["position_ids"] = calls[0]["position_ids"]
    return result


@cache
@torch.no_grad()
def computed(golden: Golden, variant: str) -> dict[str, torch.Tensor]:
    """`forward` without graph, computed once per variant."""
    return forward(golden, variant)


def loss_of(golden: Golden, logits: torch.Tensor) -> torch.Tensor:
    """VG-LLM's loss: mean cross-entropy over all supervised tokens of the batch, labels shifted by one."""
    labels = golden.tensors["in/labels"]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def step_loss_of(golden: Golden) -> torch.Tensor:
    """The same loss by `W2R2Step`: no push term, samples weighted by their number of tokens."""
    batch, tokens = batch_of(golden), golden.record["config"]["text"]["vocab_size"]
    objective = objective_config(push="none", reduction="token")
    tables = TokenTables(torch.full((tokens,), -1), torch.zeros(tokens, dtype=torch.bool))
    scorer = Scorer(tables, tokenizer_of(golden), objective)
    step = W2R2Step(model_of(golden, *VARIANTS[MAIN][:2]), RunConfig(objective=objective), scorer)
    total, _ = step(batch)
    return total / sample_weights(batch, objective.reduction).sum()


def tokenizer_of(golden: Golden) -> Any:
    """A stub with the tokenizer methods that the package calls; the recorded tokens have no text."""
    text = golden.record["config"]["text"]
    return SimpleNamespace(
        pad_token_id=text["pad_token_id"],
        convert_tokens_to_ids=lambda token: text["eos_token_id"],
        decode=lambda tokens, **_: " ".join(map(str, tokens)),
    )


LOSSES: dict[str, Callable[[Golden], torch.Tensor]] = {
    "logits": lambda golden: loss_of(golden, forward(golden, MAIN)["logits"]),
    "step": step_loss_of,
}


@cache
def gradients(golden: Golden, route: str) -> dict[str, torch.Tensor]:
    """VG-LLM's parameter name -> gradient of the loss, for all trainable parameters."""
    model = model_of(golden, *VARIANTS[MAIN][:2])
    weights = {
        vgllm_name(part, name): weight
        for part, module in (("vlm", model.base), ("geometry_merger", model.geometry_merger))
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }
    return dict(zip(weights, torch.autograd.grad(LOSSES[route](golden), list(weights.values())), strict=True))
