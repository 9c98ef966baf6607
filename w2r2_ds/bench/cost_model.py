"""Cost model: floating-point operations (FLOPs) of every part of a training step, predicted from shapes.

The count is that of training (`models/flops.py`), on modules without weights. MFU needs *model* FLOPs; the cost model
predicts the operations that a step *executes*: half of a causal block, the scores of attention once more in its
backward pass, and the layers once more with activation checkpointing. LoRA's own products, about 1 %, are not counted.
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
"""Cost of attention's backward in forwards: FlashAttention recomputes the scores and makes four products, not two."""


@dataclass(frozen=True)
class Mode:
    """How the language model is trained.

    Attributes:
        full: full fine-tuning; otherwise LoRA, whose backward pass computes no gradients of frozen weights.
        checkpointing: activation checkpointing; layers are recomputed in the backward pass.
    """

    full: bool = False
    checkpointing: bool = True

    @property
    def linear(self) -> float:
        """Cost of a training step in units of one forward: linear layers."""
        return (3.0 if self.full else 2.0) + self.checkpointing

    @property
    def attention(self) -> float:
        """Cost of a training step in units of one forward: attention."""
        return 1.0 + BACKWARD_ATTENTION + self.checkpointing

    @property
    def head(self) -> float:
        """Cost of a training step in units of one forward: the LM head, which is not recomputed."""
        return 3.0 if self.full else 2.0


@dataclass(frozen=True)
class Pass:
    """FLOPs of one forward pass of the language model."""

    linear: float
    attention: float
    head: float

    def forward(self) -> float:
        """FLOPs of a pass without gradients."""
        return self.linear + self.attention + self.head

    def trained(self, mode: Mode) -> float:
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
    """The modules of a shape; the same ones for other samples of the same model."""
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


def language(shape: Shape, rows: int | None = None, questions: int = 1, causal: bool = True) -> Pass:
    """FLOPs of one forward over a sequence.

    Args:
        shape: shape of the model and of a sample.
        rows: number of positions for which the last layer and the head are computed; None for all.
        questions: number of suffixes that share one prefix.
        causal: operations that a causal kernel executes; otherwise model FLOPs, see `models/flops.py`.
    """
    found, suffix = modules(shape), shape.tokens - shape.prefix_tokens
    suffixes = [shape.prefix_tokens + count * suffix for count in range(questions + 1)]
    ends = [0, *suffixes] if questions > 1 else [0, shape.tokens]
    tokens, pairs = tokens_and_pairs([ends], causal)
    read = None if rows is None else questions * rows
    # Every answer position attends to nearly all tokens of its sample, also with a causal kernel.
    linear, attention = found.family.decoder_flops(found.vlm, tokens, pairs, read, (read or 0) * shape.tokens)
    head = products(found.vlm.get_output_embeddings(), tokens if read is None else read)
    return Pass(linear.forward, attention.forward, head.forward)


@dataclass(frozen=True)
class Step:
    """FLOPs per sample of one training step.

    Attributes:
        vision, geometry: the frozen towers.
        merger: the geometry merger, which is trained.
        fused: the fused pass, which is trained.
        shortcut: the shortcut pass.
    """

    vision: float
    geometry: float
    merger: float
    fused: float
    shortcut: float

    def total(self, geometry: bool = True, vision: bool = True) -> float:
        """FLOPs of the whole step; without the towers whose features are cached."""
        parts = self.merger + self.fused + self.shortcut
        return parts + (self.vision if vision else 0.0) + (self.geometry if geometry else 0.0)


def baseline_step(shape: Shape, mode: Mode) -> Step:
    """HF Trainer baseline: one pass, logits at all positions, all layers of VGGT."""
    return Step(
        vision(shape), geometry(shape, shape.vggt.depth), 3 * geometry_merger(shape), language(shape).trained(mode), 0.0
    )


def naive_step(shape: Shape, mode: Mode) -> Step:
    """Two passes of the baseline, both with gradients; the vision tower runs in both."""
    one = baseline_step(shape, mode)
    return Step(2 * one.vision, one.geometry, one.merger, one.fused, one.fused)


def shared_step(shape: Shape, mode: Mode) -> Step:
    """Two passes with shared features, the shortcut one without gradients; logits at all positions."""
    one = baseline_step(shape, mode)
    return Step(one.vision, one.geometry, one.merger, one.fused, language(shape).forward())


def own_step(shape: Shape, mode: Mode, questions: int = 1, two_passes: bool = True) -> Step:
    """This project's step, per sample, with `questions` questions about a scene packed in one sequence."""
    passed = language(shape, shape.answer_tokens, questions)
    towers = (vision(shape), geometry(shape, shape.geometry_layer + 1), 3 * geometry_merger(shape))
    tower, encoder, merger = (part / questions for part in towers)
    return Step(
        tower,
        encoder,
        merger,
        passed.trained(mode) / questions,
        passed.forward() / questions if two_passes else 0.0,
    )


def model_operations(shape: Shape, two_passes: bool) -> float:
    """Model FLOPs of the language model per sample under LoRA, for MFU; LoRA's own products are not counted."""
    passed = language(shape, shape.answer_tokens, causal=False)
    linear = passed.linear + passed.head
    return 2 * linear + 3 * passed.attention + (passed.forward() if two_passes else 0.0)
