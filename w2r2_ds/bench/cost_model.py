"""Cost model: floating-point operations (FLOPs) of every part of a training step, from shapes alone.

A multiply-add is two operations. Attention counts the causal half in the language model and all pairs in the towers.
Norms, activations and LoRA's own products are not counted. `training/throughput.py` counts the FLOPs of a real model
and batch, with all pairs of the attention (PaLM's convention for MFU).
"""

from __future__ import annotations

from dataclasses import dataclass

from w2r2_ds.bench.shapes import MERGE, PATCH, Shape
from w2r2_ds.models.vggt.model import VGGTConfig

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


def vision(shape: Shape) -> float:
    """FLOPs of the vision tower and its merger for all frames."""
    columns, rows = shape.grid
    patches, hidden = columns * rows, shape.vision_hidden
    per_layer = 4 * hidden**2 + 3 * hidden * shape.vision_intermediate
    full = len(shape.vision_full)
    window = min(patches, (shape.vision_window // PATCH) ** 2)
    seen = full * patches + (shape.vision_depth - full) * window
    embed = 3 * 2 * PATCH**2 * hidden
    merged = hidden * MERGE**2
    merger = (merged**2 + merged * shape.hidden) / MERGE**2
    per_patch = 2 * (shape.vision_depth * per_layer + embed + merger) + 4 * hidden * seen
    return shape.frames * patches * per_patch


def vggt(config: VGGTConfig, frames: int, tokens: int, layers: int) -> float:
    """FLOPs of VGGT's ViT and first `layers` layers for `frames` frames of `tokens` tokens each."""
    width, every = config.embed_dim, frames * tokens
    vit = config.vit_depth * (2 * (4 + 2 * config.vit_mlp_ratio) * width**2 + 4 * width * tokens)
    linear = 2 * (4 + 2 * config.mlp_ratio) * width**2
    layer = 2 * linear + 4 * width * tokens + 4 * width * every
    patches = frames * (tokens - config.special_tokens)
    return every * (vit + layers * layer) + patches * 2 * 3 * config.patch_size**2 * width


def geometry_merger(shape: Shape) -> float:
    """FLOPs of one forward of the geometry merger."""
    merged = 2 * shape.vggt.embed_dim * MERGE**2
    return 2 * shape.visual_tokens * (merged * shape.merger_hidden + shape.merger_hidden * shape.hidden)


def layer_weights(shape: Shape) -> tuple[int, int]:
    """Number of weights of one decoder layer: all, and those of the key and value projections."""
    keys = 2 * shape.hidden * (shape.hidden // shape.heads) * shape.kv_heads
    return 2 * shape.hidden**2 + keys + 3 * shape.hidden * shape.intermediate, keys


def language(shape: Shape, rows: int | None = None, questions: int = 1) -> Pass:
    """FLOPs of one forward over a sequence.

    Args:
        shape: shape of the model and of a sample.
        rows: number of positions for which the last layer and the head are computed; None for all.
        questions: number of suffixes that share one prefix.
    """
    weights, keys = layer_weights(shape)
    prefix, suffix = shape.prefix_tokens, shape.tokens - shape.prefix_tokens
    tokens = prefix + questions * suffix
    pairs = prefix**2 / 2 + questions * (suffix * prefix + suffix**2 / 2)
    whole_layers = shape.layers if rows is None else shape.layers - 1
    linear = 2.0 * whole_layers * weights * tokens
    attention = 4.0 * whole_layers * shape.hidden * pairs
    read = tokens if rows is None else questions * rows
    if rows is not None:
        linear += 2.0 * (keys * tokens + (weights - keys) * read)
        attention += 4.0 * shape.hidden * read * (prefix + suffix)
    return Pass(linear, attention, 2.0 * shape.hidden * shape.vocabulary * read)


@dataclass(frozen=True)
class Step:
    """FLOPs per sample of one training step.

    Attributes:
        vision, geometry: the frozen towers.
        merger: the geometry merger, which is trained.
        fused: the fused pass, which is trained.
        shortcut: the visual-only pass.
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
    geometry = vggt(shape.vggt, shape.frames, shape.geometry_tokens, shape.vggt.depth)
    return Step(vision(shape), geometry, 3 * geometry_merger(shape), language(shape).trained(mode), 0.0)


def naive_step(shape: Shape, mode: Mode) -> Step:
    """Two passes of the baseline, both with gradients; the vision tower runs in both."""
    one = baseline_step(shape, mode)
    return Step(2 * one.vision, one.geometry, one.merger, one.fused, one.fused)


def shared_step(shape: Shape, mode: Mode) -> Step:
    """Two passes with shared features, the visual-only one without gradients; logits at all positions."""
    one = baseline_step(shape, mode)
    return Step(one.vision, one.geometry, one.merger, one.fused, language(shape).forward())


def own_step(shape: Shape, mode: Mode, questions: int = 1, two_passes: bool = True) -> Step:
    """This project's step, per sample, with `questions` questions about a scene packed in one sequence."""
    passed = language(shape, shape.answer_tokens, questions)
    geometry = vggt(shape.vggt, shape.frames, shape.geometry_tokens, shape.geometry_layer + 1)
    towers = (vision(shape) / questions, geometry / questions, 3 * geometry_merger(shape) / questions)
    return Step(*towers, passed.trained(mode) / questions, passed.forward() / questions if two_passes else 0.0)


def model_operations(shape: Shape, two_passes: bool) -> float:
    """Model FLOPs of the language model per sample under LoRA, counted for MFU as in `training/throughput.py`.

    All pairs of attention, its backward twice its forward; no recomputation.
    """
    passed = language(shape, shape.answer_tokens)
    products, attention = passed.linear + passed.head, 2 * passed.attention
    return 2 * products + 3 * attention + (products + attention if two_passes else 0.0)
