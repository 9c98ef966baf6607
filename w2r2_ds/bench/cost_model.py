"""The cost model: floating point operations of every part of a step, from the shapes alone.

A multiply and an add are two operations. Attention is counted as the causal half in the language model and whole in the
towers; norms, activations, LoRA's own products and everything else that is small are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from w2r2_ds.bench.shapes import MERGE, PATCH, Shape
from w2r2_ds.models.vggt.model import VGGTConfig

TERA = 1e12
BACKWARD_ATTENTION = 2.5
"""Of one forward: the scores again, and four products instead of two."""


@dataclass(frozen=True)
class Mode:
    """How the language model is trained.

    Attributes:
        full: all of its weights; else LoRA, whose backward pass makes no gradients of frozen weights.
        checkpointing: layers are computed again in the backward pass.
    """

    full: bool = False
    checkpointing: bool = True

    @property
    def linear(self) -> float:
        """Cost of a step in forwards, of linear layers."""
        return (3.0 if self.full else 2.0) + self.checkpointing

    @property
    def attention(self) -> float:
        """Cost of a step in forwards, of attention."""
        return 1.0 + BACKWARD_ATTENTION + self.checkpointing

    @property
    def head(self) -> float:
        """Cost of a step in forwards, of the LM head, which is not computed again."""
        return 3.0 if self.full else 2.0


@dataclass(frozen=True)
class Pass:
    """Forward operations of one pass of the language model."""

    linear: float
    attention: float
    head: float

    def forward(self) -> float:
        """Of a pass without a graph."""
        return self.linear + self.attention + self.head

    def trained(self, mode: Mode) -> float:
        """Of forward, backward and what is computed again."""
        return mode.linear * self.linear + mode.attention * self.attention + mode.head * self.head


def vision(shape: Shape) -> float:
    """The vision tower and its merger, for all frames."""
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
    """VGGT up to so many layers, for frames of so many tokens each."""
    width, every = config.embed_dim, frames * tokens
    vit = config.vit_depth * (2 * (4 + 2 * config.vit_mlp_ratio) * width**2 + 4 * width * tokens)
    linear = 2 * (4 + 2 * config.mlp_ratio) * width**2
    layer = 2 * linear + 4 * width * tokens + 4 * width * every
    patches = frames * (tokens - config.special_tokens)
    return every * (vit + layers * layer) + patches * 2 * 3 * config.patch_size**2 * width


def geometry_merger(shape: Shape) -> float:
    """One forward of the trained merger."""
    merged = 2 * shape.vggt.embed_dim * MERGE**2
    return 2 * shape.visual_tokens * (merged * shape.merger_hidden + shape.merger_hidden * shape.hidden)


def layer_weights(shape: Shape) -> tuple[int, int]:
    """Weights of one decoder layer: all of them, and those of keys and values."""
    keys = 2 * shape.hidden * (shape.hidden // shape.heads) * shape.kv_heads
    return 2 * shape.hidden**2 + keys + 3 * shape.hidden * shape.intermediate, keys


def language(shape: Shape, rows: int | None = None, questions: int = 1) -> Pass:
    """One forward over a sequence.

    Args:
        shape: of the model and of a sample.
        rows: hidden states that are read: the last layer and the head are computed for them only; None for all.
        questions: suffixes that share one prefix.
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
    """Operations per sample of one way to train.

    Attributes:
        vision, geometry: of the towers.
        merger: of the geometry merger, which trains.
        fused: of the pass that trains.
        shortcut: of the other.
    """

    vision: float
    geometry: float
    merger: float
    fused: float
    shortcut: float

    def total(self, geometry: bool = True, vision: bool = True) -> float:
        """Of the whole step; without what a cache holds."""
        parts = self.merger + self.fused + self.shortcut
        return parts + (self.vision if vision else 0.0) + (self.geometry if geometry else 0.0)


def field_step(shape: Shape, mode: Mode) -> Step:
    """The field's way: one pass, logits on every row, all of VGGT."""
    geometry = vggt(shape.vggt, shape.frames, shape.geometry_tokens, shape.vggt.depth)
    return Step(vision(shape), geometry, 3 * geometry_merger(shape), language(shape).trained(mode), 0.0)


def naive_step(shape: Shape, mode: Mode) -> Step:
    """Two passes of the field's with a graph each; the vision tower runs in both."""
    one = field_step(shape, mode)
    return Step(2 * one.vision, one.geometry, one.merger, one.fused, one.fused)


def shared_step(shape: Shape, mode: Mode) -> Step:
    """Features shared and the shortcut without a graph; logits still on every row."""
    one = field_step(shape, mode)
    return Step(one.vision, one.geometry, one.merger, one.fused, language(shape).forward())


def own_step(shape: Shape, mode: Mode, questions: int = 1, two_passes: bool = True) -> Step:
    """This project's step, per sample, with so many questions about a scene in one sequence."""
    passed = language(shape, shape.answer_tokens, questions)
    geometry = vggt(shape.vggt, shape.frames, shape.geometry_tokens, shape.geometry_layer + 1)
    towers = (vision(shape) / questions, geometry / questions, 3 * geometry_merger(shape) / questions)
    return Step(*towers, passed.trained(mode) / questions, passed.forward() / questions if two_passes else 0.0)


def model_operations(shape: Shape, two_passes: bool) -> float:
    """What MFU counts of the language model per sample under LoRA, as `training/throughput.py` does.

    Attention whole, its backward pass twice its forward; nothing that need not be computed, nothing computed again.
    """
    passed = language(shape, shape.answer_tokens)
    products, attention = passed.linear + passed.head, 2 * passed.attention
    return 2 * products + 3 * attention + (products + attention if two_passes else 0.0)
