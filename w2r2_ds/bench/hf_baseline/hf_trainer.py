"""HF Trainer baseline: Hugging Face's Trainer on stock Qwen2.5-VL, logits at all positions, VGGT in every step.

Follows VG-LLM (github.com/LaVi-Lab/VG-LLM): one pass per sample, a loss over all positions, and all layers of VGGT
computed and kept in memory, although only the last but one is used. The weights are those of the model under test.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from w2r2_ds.bench.harness import Lap, timed
from w2r2_ds.bench.model import CroppedVGGT, Subject, bench_optimizer
from w2r2_ds.bench.shapes import IGNORED
from w2r2_ds.models.attention.vision import VISION_ATTENTION
from w2r2_ds.models.family import find_family
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch


@contextmanager
def stock_forwards(model: W2R2) -> Iterator[None]:
    """Use the code of transformers in the block: forwards of the classes, and their activation checkpointing.

    Kernels and activation checkpointing of this project override the forward of module instances; the overrides are
    removed and restored. As with the Trainer's option `gradient_checkpointing`, every decoder layer is recomputed.
    """
    text = model.family.language_model(model.base)
    # transformers' loop over the windows of the vision tower, instead of one call per layer.
    tower, base = model.base.config.vision_config._attn_implementation, model.base
    if tower == VISION_ATTENTION:
        base.set_attn_implementation({"vision_config": "sdpa"})
    overridden = [module for module in model.vlm.modules() if "forward" in module.__dict__]
    overrides = [(module, module.__dict__.pop("forward")) for module in overridden]
    for layer in text.layers:
        # The attributes that transformers sets; the method that sets them has other names in other versions.
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in text.layers:
            layer.gradient_checkpointing = False
        for module, forward in overrides:
            module.forward = forward
        if tower == VISION_ATTENTION:
            base.set_attn_implementation({"vision_config": tower})


TowerOutputs = tuple[Any, Tensor]
"""Output of the vision tower and geometry features ``[frames, rows, columns, channels]`` of a sample."""


class BaselineModel(nn.Module):
    """VLM, VGGT and merger in one forward, as in VG-LLM.

    Args:
        model: the model whose modules are used.

    Attributes:
        given: outputs of the towers; None to compute them.
    """

    def __init__(self, model: W2R2) -> None:
        super().__init__()
        self.vlm, self.geometry_merger = model.vlm, model.geometry_merger
        object.__setattr__(self, "_model", model)  # no submodule: the Trainer handles the VLM and the merger only
        self.given: TowerOutputs | None = None

    @property
    def encoder(self) -> CroppedVGGT:
        """The geometry encoder."""
        encoder = self.__dict__["_model"].geometry
        assert isinstance(encoder, CroppedVGGT), "built by bench/model.py"
        return encoder

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, geometry_images: Tensor, **rest: Any) -> Any:
        """Output of the stock VLM, with a loss if `rest` has labels; the shortcut if `geometry_images` is empty."""
        visual = self.fused(pixel_values, image_grid_thw, geometry_images)
        return self.vlm(mm_encoder_outputs={"image": visual}, image_grid_thw=image_grid_thw, use_cache=False, **rest)

    def fused(self, pixel_values: Tensor, grid: Tensor, geometry_images: Tensor) -> Any:
        """Output of the vision tower with the merged geometry features added."""
        visual = self.visual(pixel_values, grid)
        if len(geometry_images):
            visual = copy.copy(visual)
            tokens = torch.cat(visual.pooler_output) + self.geometry_merger([self.geometry(geometry_images)])
            visual.pooler_output = (tokens,)
        return visual

    def visual(self, pixel_values: Tensor, grid: Tensor) -> Any:
        """Output of the frozen vision tower."""
        if self.given:
            return self.given[0]
        base: Any = self.vlm.get_base_model()  # type: ignore[operator]
        return base.model.get_image_features(pixel_values, grid, return_dict=True)

    @torch.no_grad()
    def geometry(self, images: Tensor) -> Tensor:
        """Features ``[frames, rows, columns, channels]`` of the last but one layer; all layers are kept."""
        if self.given:
            return self.given[1]
        vggt = self.encoder.vggt
        layers = vggt.aggregator(images[None], list(range(vggt.config.depth)))
        tokens = list(layers.values())[-2][0]
        grid = tokens[:, vggt.config.special_tokens :].unflatten(1, (images.shape[-2] // vggt.config.patch_size, -1))
        return self.encoder.crop(grid)


def stock_inputs(batch: Batch) -> dict[str, Tensor]:
    """Inputs of `BaselineModel.forward` for a batch of one sample with images; labels at the answer's tokens only."""
    assert len(batch.ids) == 1, "one pass per sample"
    frames = batch.visuals.geometry_frames[0]
    assert frames is not None, "the batch has frames, not cached features"
    labels = torch.full_like(batch.input_ids, IGNORED)
    # `answer_positions` are the positions that predict the answer; the stock loss shifts the labels itself.
    labels[0, batch.answer_positions.position + 1] = batch.answer_positions.label
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "mm_token_type_ids": batch.token_types,
        "pixel_values": find_family("qwen2_5_vl").tower_pixels(batch.visuals, torch.float32),
        "image_grid_thw": batch.visuals.grid_thw,
        "geometry_images": unit_range(frames),
        "labels": labels,
    }


class StepTimer(TrainerCallback):
    """Time a step from its forward to the optimizer's update, without data loading."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.lap, self.context = device, Lap(), timed(Lap(), device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context = timed(self.lap, self.device)
        self.context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.__exit__(None, None, None)


class BaselineTrainer:
    """Steps of Hugging Face's Trainer on one sample.

    Args:
        subject: the model to train.
        batch: a batch of one sample.
    """

    def __init__(self, subject: Subject, batch: Batch) -> None:
        self.subject, self.model = subject, BaselineModel(subject.model)
        self.inputs = stock_inputs(batch)
        self.timer = StepTimer(subject.device)
        self.folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self.folder.name,
            per_device_train_batch_size=1,
            max_steps=1,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,  # the sample is already on the device
            use_cpu=subject.device.type == "cpu",
        )
        self.trainer = Trainer(
            model=self.model,
            args=arguments,
            data_collator=lambda items: dict(items[0]),
            train_dataset=[self.inputs],  # type: ignore[arg-type]
            optimizers=(bench_optimizer(subject.model), None),
            callbacks=[self.timer],
        )
        self.trainer.remove_callback(PrinterCallback)

    def step(self, given: TowerOutputs | None = None) -> Lap:
        """Train one step and return its time; with the towers' outputs in `given`, both towers are skipped."""
        self.timer.lap, self.model.given = Lap(), given
        with stock_forwards(self.subject.model):
            self.trainer.train()
        return self.timer.lap

    @torch.no_grad()
    def towers(self) -> TowerOutputs:
        """Outputs of both towers for the sample."""
        self.model.given = None
        visual = self.model.visual(self.inputs["pixel_values"], self.inputs["image_grid_thw"])
        return visual, self.model.geometry(self.inputs["geometry_images"])
