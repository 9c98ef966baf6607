"""Three skinny products with a dropped matrix, for LoRA: the mask is applied where a tile is loaded or stored.

With D = keep * x / (1 - p), torch writes D to memory, reads it, and drops the gradient in a temporary of its own.
Roofline of one projection, x ``[T, K]``, rank r, bfloat16, one byte per element of the mask:

    down    low = D A'        read x and mask           3 T K bytes, 2 T K r FLOP (torch: 7 T K)
    outer   A's gradient      read x and mask           3 T K bytes, 2 T K r FLOP (torch: 7 T K)
    up      x's gradient +=   read, write it, mask      5 T K bytes, 2 T K r FLOP (torch: 11 T K)

T 6304, K 3584 (7B), r 16, H100 3.35 TB/s: 0.020, 0.020, 0.034 ms (torch 0.047, 0.047, 0.074); K 2048 (3B): 4/7 of it.
FLOP are 0.72 G each, 0.002 ms of tensor cores: bandwidth alone counts. Computed, never measured: no GPU was there.
The mask is torch's, not made in the kernel: ten rounds of Philox per element would cost more than its byte, and so both
ways draw the same one.
"""

# mypy: disable-error-code=no-untyped-def
# Triton reads a kernel's annotations and knows only its own.

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.kernels.select import Implementation
from w2r2_ds.kernels.triton_compat import blocks, jit, power_of_two, precision, tl

ROWS, COLUMNS = 64, 128
"""Sides of a tile."""
SHARED = 96 * 2**10
"""Bytes of shared memory that a program has on every GPU of sm_80 and later."""
PARTS = 16
"""Most parts into which `outer` splits the rows, added up in a fixed order."""


def down(x: Tensor, keep: Tensor, a: Tensor, scale: float, kernels: Implementation) -> Tensor:
    """``scale * (keep * x) @ a.T``: ``[T, K]``, bool ``[T, K]``, ``[r, K]`` to ``[T, r]``, in the dtype of ``x``."""
    if kernels == "torch" or not fits(len(a), x.dtype):
        return (torch.where(keep, x, 0.0) @ a.t()).mul_(scale)
    rows, width = x.shape
    low = x.new_empty(rows, len(a))
    if rows:
        _down[(blocks(rows, ROWS),)](
            x,
            keep,
            a,
            low,
            scale,
            rows,
            width,
            len(a),
            RANK=_rank(len(a)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            HOW=precision(x.dtype),
        )
    return low


def outer(low: Tensor, x: Tensor, keep: Tensor, scale: float, kernels: Implementation) -> Tensor:
    """``scale * low.T @ (keep * x)``: ``[T, r]``, ``[T, K]``, bool ``[T, K]`` to ``[r, K]``, in the dtype of ``x``."""
    if kernels == "torch" or not fits(low.shape[1], x.dtype):
        return (low * scale).t() @ torch.where(keep, x, 0.0)
    rows, width = x.shape
    parts = min(PARTS, max(blocks(rows, ROWS), 1))
    part = x.new_zeros(parts, low.shape[1], width, dtype=torch.float32)
    if rows:
        _outer[(blocks(width, COLUMNS), parts)](
            low,
            x,
            keep,
            part,
            scale,
            rows,
            width,
            low.shape[1],
            blocks(blocks(rows, ROWS), parts),
            RANK=_rank(low.shape[1]),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            HOW=precision(x.dtype),
        )
    return part.sum(0).to(x.dtype)


def up_(out: Tensor, low: Tensor, a: Tensor, keep: Tensor, scale: float, kernels: Implementation) -> Tensor:
    """``out += scale * keep * (low @ a)`` in place: ``[T, K]``, ``[T, r]``, ``[r, K]``, bool ``[T, K]``."""
    if kernels == "torch" or not fits(len(a), out.dtype):
        return out.add_(torch.where(keep, (low * scale) @ a, 0.0))
    rows, width = out.shape
    if rows:
        _up[(blocks(rows, ROWS), blocks(width, COLUMNS))](
            out,
            low,
            a,
            keep,
            scale,
            rows,
            width,
            len(a),
            RANK=_rank(len(a)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            HOW=precision(out.dtype),
        )
    return out


def fits(rank: int, dtype: torch.dtype) -> bool:
    """Whether a rank's tiles fit into shared memory, up to 128 in bfloat16 and 32 in float32; else torch does the work.

    The largest are those of `down`, of which two stages are loaded: compiled for sm_90, 2 * (64 + rank) * 128 numbers
    in float32, and fewer in bfloat16. At rank 128 that is 192 KiB, more than an A100 has.
    """
    return 2 * (ROWS + _rank(rank)) * COLUMNS * dtype.itemsize <= SHARED


def _rank(rank: int) -> int:
    """Rank rounded up to what `tl.dot` takes."""
    return max(power_of_two(rank), 16)


@jit
def _down(
    x,
    keep,
    a,
    low,
    scale,
    rows,
    width,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """One program makes `ROWS` rows of ``low``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        at = row[:, None] * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        kept = tl.load(keep + at, mask=inside, other=0) != 0
        tile = tl.load(x + at, mask=inside & kept, other=0.0).to(tl.float32)
        there = (column < width)[:, None] & (r < rank)[None, :]
        weight = tl.load(a + r[None, :] * width + column[:, None], mask=there, other=0.0).to(tl.float32)
        total = tl.dot(tile, weight, total, input_precision=HOW)
    inside = (row < rows)[:, None] & (r < rank)[None, :]
    tl.store(low + row[:, None] * rank + r[None, :], (total * scale).to(low.dtype.element_ty), mask=inside)


@jit
def _outer(
    low,
    x,
    keep,
    part,
    scale,
    rows,
    width,
    rank,
    tiles,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """One program makes `COLUMNS` columns of one part, from `tiles` tiles of rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * tiles * ROWS
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for tile_index in range(0, tiles):
        row = first + tile_index * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        kept = tl.load(keep + at, mask=inside, other=0) != 0
        tile = tl.load(x + at, mask=inside & kept, other=0.0).to(tl.float32)
        there = (row < rows)[None, :] & (r < rank)[:, None]
        left = tl.load(low + row[None, :] * rank + r[:, None], mask=there, other=0.0).to(tl.float32)
        total = tl.dot(left, tile, total, input_precision=HOW)
    at = (tl.program_id(1) * rank + r)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(part + at, total * scale, mask=(r < rank)[:, None] & (column < width)[None, :])


@jit
def _up(
    out,
    low,
    a,
    keep,
    scale,
    rows,
    width,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HOW: tl.constexpr,
) -> None:
    """One program updates one tile of ``out``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    there = (row < rows)[:, None] & (r < rank)[None, :]
    left = tl.load(low + row[:, None] * rank + r[None, :], mask=there, other=0.0).to(tl.float32)
    there = (r < rank)[:, None] & (column < width)[None, :]
    right = tl.load(a + r[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
    product = tl.dot(left, right, input_precision=HOW) * scale
    at = row[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    old = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (old + tl.where(kept, product, 0.0)).to(out.dtype.element_ty), mask=inside)
