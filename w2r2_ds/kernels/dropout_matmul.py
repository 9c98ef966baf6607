"""Matrix products of LoRA with a dropout mask, which Triton applies while it loads or stores a tile.

With D = keep * x / (1 - p), PyTorch writes D to memory and reads it again, and makes another temporary tensor for the
gradient. Memory traffic of one projection in bfloat16, x ``[T, K]``, rank r, one byte per element of the mask:

    down    low = D A'        read x and mask           3 T K bytes, 2 T K r FLOP (PyTorch: 7 T K bytes)
    outer   gradient of A     read x and mask; parts    3 T K + 128 r K bytes, 2 T K r FLOP (PyTorch: 7 T K bytes)
    up      gradient of x +=  read, write it, mask      5 T K bytes, 2 T K r FLOP (PyTorch: 13 T K bytes)

T 6304, K 3584 (7B), r 16 on an H100 (3.35 TB/s): 0.020, 0.022 and 0.034 ms (PyTorch 0.047, 0.047 and 0.088 ms). The
0.72 GFLOP take 0.002 ms, so memory bandwidth is the limit. Calculated, not measured on a GPU. The loop of `down` and
`outer` copies the next tiles asynchronously to shared memory (cp.async, 16 bytes per thread) while tensor cores
multiply this one; tests/kernels/test_ahead_of_time.py checks it in the compiled code.

PyTorch draws the mask, so that both implementations use the same one. Drawing it in the kernel would take ten rounds of
Philox per element, which is slower than reading its byte.

Every matrix is contiguous and row-major: element (row, column) of ``[T, K]`` lies at offset row * K + column.
"""

# mypy: disable-error-code=no-untyped-def
# Triton interprets the annotations of a kernel itself and accepts only its own, such as tl.constexpr.

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.kernels.select import Backend
from w2r2_ds.kernels.triton_compat import dot_dtype, interpreted, jit, num_blocks, power_of_two, tl

ROWS, COLUMNS = 64, 128
"""Rows and columns of a tile of the ``[T, K]`` matrix."""
MAX_RANK = 64
"""Largest rank of the kernels. At 128 the tiles exceed the registers of sm_80 and the shared memory of sm_86 and 89."""
MAX_SPLITS = 16
"""Maximum number of parts into which `outer` splits the rows (split-K)."""


def down(x: Tensor, keep: Tensor, a: Tensor, scale: float, kernels: Backend) -> Tensor:
    """``scale * (keep * x) @ a.T``, in the dtype of ``x``.

    Args:
        x: ``[T, K]``.
        keep: ``[T, K]`` bool, False for dropped elements.
        a: ``[r, K]``.
        scale: factor.
        kernels: the backend.

    Returns:
        ``[T, r]``.
    """
    if kernels == "torch" or not fits(len(a), x.dtype):
        return (torch.where(keep, x, 0.0) @ a.t()).mul_(scale)
    rows, width = x.shape
    low = x.new_empty(rows, len(a))
    if rows:
        _down[(num_blocks(rows, ROWS),)](
            x,
            keep,
            a,
            low,
            scale,
            rows,
            width,
            RANK=len(a),
            RANK_TILE=_padded_rank(len(a)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DOT=dot_dtype(x.dtype),
        )
    return low


def outer(low: Tensor, x: Tensor, keep: Tensor, scale: float, kernels: Backend) -> Tensor:
    """``scale * low.T @ (keep * x)``, in the dtype of ``x``: the gradient of LoRA's A.

    Args:
        low: ``[T, r]``.
        x: ``[T, K]``.
        keep: ``[T, K]`` bool, False for dropped elements.
        scale: factor.
        kernels: the backend.

    Returns:
        ``[r, K]``.
    """
    if kernels == "torch" or not fits(low.shape[1], x.dtype):
        return (low * scale).t() @ torch.where(keep, x, 0.0)
    rows, width = x.shape
    # The sum runs over all T rows, and the result has too few tiles to occupy a GPU. So several programs sum a part of
    # the rows each (split-K). The parts are then added in a fixed order; atomic adds would have a random one.
    splits = min(MAX_SPLITS, max(num_blocks(rows, ROWS), 1))
    # Every program writes its whole part; without rows there is no program.
    parts = (x.new_empty if rows else x.new_zeros)((splits, low.shape[1], width), dtype=torch.float32)
    if rows:
        _outer[(num_blocks(width, COLUMNS), splits)](
            low,
            x,
            keep,
            parts,
            scale,
            rows,
            width,
            num_blocks(num_blocks(rows, ROWS), splits),
            RANK=low.shape[1],
            RANK_TILE=_padded_rank(low.shape[1]),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DOT=dot_dtype(x.dtype),
        )
    return parts.sum(0).to(x.dtype)


def up_(out: Tensor, low: Tensor, a: Tensor, keep: Tensor, scale: float, kernels: Backend) -> Tensor:
    """``out += scale * keep * (low @ a)`` in place: adds LoRA's part to the gradient of x.

    Args:
        out: ``[T, K]``.
        low: ``[T, r]``.
        a: ``[r, K]``.
        keep: ``[T, K]`` bool, False for dropped elements.
        scale: factor.
        kernels: the backend.

    Returns:
        ``out``.
    """
    if kernels == "torch" or not fits(len(a), out.dtype):
        return out.add_(torch.where(keep, (low * scale) @ a, 0.0))
    rows, width = out.shape
    if rows:
        _up[(num_blocks(rows, ROWS), num_blocks(width, COLUMNS))](
            out,
            low,
            a,
            keep,
            scale,
            rows,
            width,
            RANK=len(a),
            RANK_TILE=_padded_rank(len(a)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DOT=dot_dtype(out.dtype),
        )
    return out


def fits(rank: int, dtype: torch.dtype) -> bool:
    """Whether the kernels compute products of this rank and dtype: bfloat16 up to rank `MAX_RANK`; else PyTorch does.

    Tensor cores have no exact product of float32 values. Without them the tiles exceed the registers.
    """
    return interpreted() or (dtype == torch.bfloat16 and rank <= MAX_RANK)


def _padded_rank(rank: int) -> int:
    """Rank rounded up to a size that `tl.dot` accepts: a power of two, at least 16."""
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
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Compute `ROWS` rows of ``low``: one program per block of rows, with a loop over blocks of columns."""
    # int64: row * width exceeds int32 from 2**31 elements on.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK_TILE)
    total = tl.zeros((ROWS, RANK_TILE), tl.float32)  # sums of thousands of products need float32
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        offset = row[:, None] * width + column[None, :]  # [ROWS, COLUMNS]
        # Incomplete tiles: elements outside the matrix are loaded as 0, which adds nothing to the sum.
        inside = (row < rows)[:, None] & (column < width)[None, :]
        kept = tl.load(keep + offset, mask=inside, other=0) != 0
        # The dropout mask is applied after the load. In the load's own mask it would make every element a separate
        # two-byte access that also waits for the mask. `inside` is the same for 16 neighbouring columns.
        tile = tl.where(kept, tl.load(x + offset, mask=inside, other=0.0).to(DOT), 0.0)
        inside_a = (column < width)[:, None] & (r < RANK)[None, :]
        # `a` is [RANK, width] in memory; these offsets are [COLUMNS, RANK_TILE], so that the tile is loaded transposed.
        weight = tl.load(a + r[None, :] * width + column[:, None], mask=inside_a, other=0.0).to(DOT)
        total = tl.dot(tile, weight, total, input_precision="ieee")
    inside_low = (row < rows)[:, None] & (r < RANK)[None, :]
    tl.store(low + row[:, None] * RANK + r[None, :], (total * scale).to(low.dtype.element_ty), mask=inside_low)


@jit
def _outer(
    low,
    x,
    keep,
    parts,
    scale,
    rows,
    width,
    tiles,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Compute `COLUMNS` columns of one part: the sum over `tiles` blocks of rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # int64: row * width exceeds int32 from 2**31 elements on.
    first = tl.program_id(1).to(tl.int64) * tiles * ROWS
    r = tl.arange(0, RANK_TILE)
    total = tl.zeros((RANK_TILE, COLUMNS), tl.float32)
    for tile_index in range(0, tiles):
        row = first + tile_index * ROWS + tl.arange(0, ROWS)
        offset = row[:, None] * width + column[None, :]  # [ROWS, COLUMNS]
        # Rows after the last one are loaded as 0: the last part may have fewer tiles.
        inside = (row < rows)[:, None] & (column < width)[None, :]
        kept = tl.load(keep + offset, mask=inside, other=0) != 0
        tile = tl.where(kept, tl.load(x + offset, mask=inside, other=0.0).to(DOT), 0.0)  # as in `_down`
        inside_low = (r < RANK)[:, None] & (row < rows)[None, :]
        # `low` is [rows, RANK] in memory; these offsets are [RANK_TILE, ROWS], so that the tile is loaded transposed.
        left = tl.load(low + row[None, :] * RANK + r[:, None], mask=inside_low, other=0.0).to(DOT)
        total = tl.dot(left, tile, total, input_precision="ieee")
    # Every program writes its own part, [part, r, column]; the caller adds the parts.
    offset = (tl.program_id(1) * RANK + r)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(parts + offset, total * scale, mask=(r < RANK)[:, None] & (column < width)[None, :])


@jit
def _up(
    out,
    low,
    a,
    keep,
    scale,
    rows,
    width,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Update one tile of ``out`` in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK_TILE)
    inside_low = (row < rows)[:, None] & (r < RANK)[None, :]
    left = tl.load(low + row[:, None] * RANK + r[None, :], mask=inside_low, other=0.0).to(DOT)
    inside_a = (r < RANK)[:, None] & (column < width)[None, :]
    right = tl.load(a + r[:, None] * width + column[None, :], mask=inside_a, other=0.0).to(DOT)
    # RANK_TILE is one tile, so the product needs no loop. Padding from `RANK` to RANK_TILE is loaded as 0.
    product = tl.dot(left, right, input_precision="ieee") * scale
    offset = row[:, None] * width + column[None, :]  # [ROWS, COLUMNS]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    kept = tl.load(keep + offset, mask=inside, other=0) != 0
    # The sum is computed in float32 and rounded once, on the store.
    old = tl.load(out + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, (old + tl.where(kept, product, 0.0)).to(out.dtype.element_ty), mask=inside)
