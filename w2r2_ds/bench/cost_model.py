"""Cost model: floating-point operations (FLOPs) of every part of a training step, predicted from shapes.

The count is that of training (`models/flops.py`), on modules without weights. MFU needs *model* FLOPs; the cost model
predicts the operations that a step *executes*: only the lower triangle of causal attention, its scores once more in
the backward pass, and the layers once more with activation checkpointing. The products with LoRA's own matrices, about
1 %, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from w2r2_ds.bench.model import build_frontend
from w2r2_ds.bench.shapes import Shape
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.models.flops import products, tokens_and_pairs
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.model import VGGT

TERA = 1e12
BACKWARD_ATTENTION = 2.5
"""Cost of attention's backward pass in units of its forward: five products instead of two, because FlashAttention
recomputes the scores."""


@dataclass(frozen=True)
class TrainingMode:
    """How the language model is trained.

    Attributes:
        full: full fine-tuning; otherwise LoRA, whose backward pass computes no gradients of frozen weights.
        checkpointing: activation checkpointing: layers are recomputed in the backward pass.
    """

    full: bool = False
    checkpointing: bool = True

    @property
    def linear(self) -> float:
        """Cost of a training step in units of one forward: linear layers."""
        # Forward, gradients of the inputs, with full fine-tuning also gradients of the weights, recomputation.
        return (3.0 if self.full else 2.0) + self.checkpointing

    @property
    def attention(self) -> float:
        """Cost of a training step in units of one forward: attention."""
        return 1.0 + BACKWARD_ATTENTION + self.checkpointing

    @property
    def head(self) -> float:
        """Cost of a training step in units of one forward: the LM head, which is not recomputed."""
        return 3.0 if self.full else 2.0


LORA = TrainingMode()
"""LoRA with activation checkpointing, as in all benchmarks."""


@dataclass(frozen=True)
class Pass:
    """FLOPs of one forward pass of the language model."""

    linear: float
    attention: float
    head: float

    def forward(self) -> float:
        """FLOPs of a pass without gradients."""
        return self.linear + self.attention + self.head

    def trained(self, mode: TrainingMode) -> float:
        """FLOPs of forward, backward and recomputation."""
        return mode.linear * self.linear + mode.attention * self.attention + mode.head * self.head


@dataclass(frozen=True)
class Modules:
    """Modules of a shape on the meta device: sizes, no weights."""

    family: VlmFamily
    vlm: Any
    vggt: VGGT
    merger: GeometryMerger


def modules(shape: Shape) -> Modules:
    """Build the modules of a shape, once per model."""
    # The sizes of a sample are not part of the cache key.
    return _modules(replace(shape, frames=1, frame_size=(0, 0), grid=(0, 0), prompt_tokens=0, answer_tokens=0))


@cache
def _modules(shape: Shape) -> Modules:
    frontend = build_frontend(shape)
    with torch.device("meta"):
        merger = GeometryMerger(2 * shape.vggt.embed_dim, shape.hidden, shape.merger_hidden)
        return Modules(frontend.family, frontend.meta, VGGT(shape.vggt), merger)


def vision(shape: Shape) -> float:
    """FLOPs of the vision tower and its merger for all frames."""
    columns, rows = shape.grid
    found = modules(shape)
    return found.family.vision_flops(found.family.vision_tower(found.vlm), [(1, rows, columns)] * shape.frames)


def geometry(shape: Shape, layers: int) -> float:
    """FLOPs of VGGT's ViT and its first `layers` layers for all frames."""
    width, height = shape.frame_size
    return VGGTEncoder(modules(shape).vggt, [layers - 1]).flops(shape.frames, height, width)


def geometry_merger(shape: Shape) -> float:
    """FLOPs of one forward of the geometry merger."""
    return products(modules(shape).merger, shape.visual_tokens).forward


def language(shape: Shape, positions: int | None = None, questions: int = 1, causal: bool = True) -> Pass:
    """FLOPs of one forward over a sequence.

    Args:
        shape: shape of the model and of a sample.
        positions: number of positions per question for which the last layer and the head are computed; None for all.
        questions: number of questions packed in the sequence, suffixes that share one prefix.
        causal: count the operations that a causal kernel executes; otherwise model FLOPs, see `models/flops.py`.
    """
    found, suffix = modules(shape), shape.tokens - shape.prefix_tokens
    # Ends of the prefix and of every suffix in a packed sequence. A suffix attends to the prefix and to itself.
    packed_ends = [shape.prefix_tokens + count * suffix for count in range(questions + 1)]
    ends = [0, *packed_ends] if questions > 1 else [0, shape.tokens]
    tokens, pairs = tokens_and_pairs([ends], causal)
    answers = None if positions is None else questions * positions
    # Every answer position attends to nearly all tokens of its sample, also with a causal kernel.
    linear, attention = found.family.decoder_flops(found.vlm, tokens, pairs, answers, (answers or 0) * shape.tokens)
    head = products(found.vlm.get_output_embeddings(), tokens if answers is None else answers)
    return Pass(linear.forward, attention.forward, head.forward)


@dataclass(frozen=True)
class Step:
    """FLOPs per sample of one training step.

    Attributes:
        vision, geometry: the frozen encoders.
        merger: forward and backward of the geometry merger.
        fused: forward and backward of the fused pass.
        shortcut: the shortcut pass, forward only unless it has gradients.
    """

    vision: float
    geometry: float
    merger: float
    fused: float
    shortcut: float

    def total(self, geometry: bool = True, vision: bool = True) -> float:
        """FLOPs of the whole step; `geometry` or `vision` is False if the features of that encoder are cached."""
        parts = self.merger + self.fused + self.shortcut
        return parts + (self.vision if vision else 0.0) + (self.geometry if geometry else 0.0)


def baseline_step(shape: Shape, mode: TrainingMode) -> Step:
    """FLOPs of the HF Trainer baseline: one pass, logits at all positions, all layers of VGGT."""
    return Step(
        vision(shape), geometry(shape, shape.vggt.depth), 3 * geometry_merger(shape), language(shape).trained(mode), 0.0
    )


def naive_step(shape: Shape, mode: TrainingMode) -> Step:
    """FLOPs of two passes of the baseline, both with gradients; the vision tower runs in both."""
    baseline = baseline_step(shape, mode)
    return Step(2 * baseline.vision, baseline.geometry, baseline.merger, baseline.fused, baseline.fused)


def shared_step(shape: Shape, mode: TrainingMode) -> Step:
    """FLOPs of two passes with shared features, the shortcut without gradients; logits at all positions."""
    baseline = baseline_step(shape, mode)
    return Step(baseline.vision, baseline.geometry, baseline.merger, baseline.fused, language(shape).forward())


def own_step(shape: Shape, mode: TrainingMode, questions: int = 1, two_passes: bool = True) -> Step:
    """FLOPs of the step of W2R2-DS per sample, with `questions` questions about a frame set packed in one sequence."""
    one_pass = language(shape, shape.answer_tokens, questions)
    return Step(
        vision(shape) / questions,
        geometry(shape, shape.geometry_layer + 1) / questions,
        3 * geometry_merger(shape) / questions,
        one_pass.trained(mode) / questions,
        one_pass.forward() / questions if two_passes else 0.0,
    )


def model_operations(shape: Shape, two_passes: bool) -> float:
    """Model FLOPs of the language model per sample under LoRA, for MFU; without the products of LoRA's matrices."""
    one_pass = language(shape, shape.answer_tokens, causal=False)
    linear = one_pass.linear + one_pass.head
    # Frozen linear layers: forward and gradients of the inputs. Both operands of attention's products need gradients.
    return 2 * linear + 3 * one_pass.attention + (one_pass.forward() if two_passes else 0.0)
