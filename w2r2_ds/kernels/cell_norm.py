"""The geometry merger's first step: crop, RMSNorm and grouping into merge cells, each feature read and written once.

Torch copies the features into cell order, norms the copy and writes it again, in float32 in between. The kernel's
program norms one feature vector where it lies and writes it where its cell wants it. Features are frozen, so the
backward pass is the weight's gradient alone.

Roofline, bytes of bfloat16 per feature of width C: 2 C read + 2 C written forward, 4 C read backward; 3 C FLOP.
24 frames of 28 x 36 features, C 2048: forward 198 MB, H100 (3.35 TB/s) 0.059 ms, H200 (4.3) 0.046; backward the same.
The linear layers behind it cost about 20 times that. Computed, never measured: no GPU was there.
"""

# mypy: disable-error-code=no-untyped-def
# Triton reads a kernel's annotations and knows only its own.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

from w2r2_ds.kernels.select import Kernels
from w2r2_ds.kernels.triton_compat import blocks, jit, power_of_two, tl

ROWS = 64
"""Features whose share of the weight's gradient one program adds up."""


def cell_norm(features: Sequence[Tensor], weight: Tensor, eps: float, merge_size: int, kernels: Kernels) -> Tensor:
    """Normed features in cell order, ``[tokens, merge_size ** 2, C]`` in the dtype of ``weight``.

    Args:
        features: grids ``[frames, h, w, C]``, each at least one cell; cropped at the bottom and the right.
        weight: ``[C]`` of the RMSNorm.
        eps: of the RMSNorm.
        merge_size: patches per side of a cell; row-major inside it.
        kernels: which of the two ways. A gradient to the features, which nothing in training asks for, is torch's.
    """
    if kernels == "torch" or any(grid.requires_grad for grid in features):
        return norm_reference(features, weight, eps, merge_size)
    normed: Tensor = _CellNorm.apply(weight, eps, merge_size, *features)
    return normed


def norm_reference(features: Sequence[Tensor], weight: Tensor, eps: float, merge_size: int) -> Tensor:
    """`cell_norm` in PyTorch."""
    cells = [weight.new_zeros(0, merge_size**2, len(weight))]
    cells += [merge_cells(grid.to(weight.dtype), merge_size) for grid in features]
    return rms_norm(torch.cat(cells), (len(weight),), weight, eps)


def merge_cells(features: Tensor, merge_size: int) -> Tensor:
    """Group ``[frames, h, w, C]`` into ``[tokens, m * m, C]``, row-major inside a cell, cropping right and bottom."""
    frames, height, width, channels = features.shape
    rows, columns = height // merge_size, width // merge_size
    if rows == 0 or columns == 0:
        raise ValueError(f"geometry merger: a {height} x {width} grid holds no {merge_size} x {merge_size} cell")
    cropped = features[:, : rows * merge_size, : columns * merge_size]
    grid = cropped.reshape(frames, rows, merge_size, columns, merge_size, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(frames * rows * columns, merge_size**2, channels)


class _CellNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, merge_size: int, *features: Tensor) -> Tensor:
        ctx.grids = [_Grid(grid, merge_size) for grid in features]
        cells = merge_size**2
        rows = sum(grid.rows for grid in ctx.grids)
        normed, scale = weight.new_empty(rows, len(weight)), weight.new_empty(rows, dtype=torch.float32)
        begin = 0
        for grid, source in zip(ctx.grids, features, strict=True):
            if grid.rows:
                out, s = normed[begin : begin + grid.rows], scale[begin : begin + grid.rows]
                _norm[(grid.rows,)](source.contiguous(), weight, out, s, eps, **grid.sizes(len(weight)))
            begin += grid.rows
        ctx.save_for_backward(weight, scale, *features)
        return normed.view(-1, cells, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scale, *features = ctx.saved_tensors
        grad = grad.reshape(-1, len(weight)).contiguous()
        total, begin = weight.new_zeros(len(weight), dtype=torch.float32), 0
        for grid, source in zip(ctx.grids, features, strict=True):
            if grid.rows:
                rows = slice(begin, begin + grid.rows)
                programs = blocks(grid.rows, ROWS)
                part = weight.new_empty(programs, len(weight), dtype=torch.float32)
                sizes = grid.sizes(len(weight))
                _weight[(programs,)](source.contiguous(), grad[rows], scale[rows], part, grid.rows, ROWS=ROWS, **sizes)
                total += part.sum(0)
            begin += grid.rows
        return total.to(weight.dtype), None, None, *[None] * len(features)


class _Grid:
    """Where the cells of one ``[frames, h, w, C]`` lie."""

    def __init__(self, features: Tensor, merge_size: int) -> None:
        frames, self.height, self.width, _ = features.shape
        self.merge_size = merge_size
        self.down, self.across = self.height // merge_size, self.width // merge_size
        if not self.down or not self.across:
            raise ValueError(
                f"geometry merger: a {self.height} x {self.width} grid holds no {merge_size} x {merge_size} cell"
            )
        self.rows = frames * self.down * self.across * merge_size**2

    def sizes(self, channels: int) -> dict[str, int]:
        """Arguments of the kernels."""
        return {
            "height": self.height,
            "width": self.width,
            "down": self.down,
            "across": self.across,
            "channels": channels,
            "MERGE": self.merge_size,
            "BLOCK": power_of_two(channels),
        }


@jit
def _source(
    row,
    height,
    width,
    down,
    across,
    MERGE: tl.constexpr,
):
    """Index of the feature that stands at `row` in cell order."""
    patch = row % (MERGE * MERGE)
    token = row // (MERGE * MERGE)
    frame = token // (down * across)
    y = (token // across) % down * MERGE + patch // MERGE
    x = token % across * MERGE + patch % MERGE
    return (frame * height + y) * width + x


@jit
def _norm(
    features,
    weight,
    normed,
    scale,
    eps,
    height,
    width,
    down,
    across,
    channels,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program norms one feature."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    at = _source(row, height, width, down, across, MERGE) * channels + column
    w = tl.load(weight + column, mask=inside, other=0.0)
    x = tl.load(features + at, mask=inside, other=0.0).to(w.dtype).to(tl.float32)
    s = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / channels + eps)
    tl.store(normed + row * channels + column, (x * s * w.to(tl.float32)).to(normed.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)


@jit
def _weight(
    features,
    grad,
    scale,
    part,
    rows,
    height,
    width,
    down,
    across,
    channels,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program adds the weight's gradient over `ROWS` features."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * ROWS, tl.minimum((program + 1) * ROWS, rows)):
        at = _source(row, height, width, down, across, MERGE) * channels + column
        g = tl.load(grad + row * channels + column, mask=inside, other=0.0)
        x = tl.load(features + at, mask=inside, other=0.0).to(g.dtype).to(tl.float32)
        total += g.to(tl.float32) * x * tl.load(scale + row)
    tl.store(part + program * channels + column, total, mask=inside)
