"""Input embeddings of the shortcut and of the fused stream, written by one Triton kernel.

A stream is the input embeddings of one pass. Both share the text embeddings and differ in the visual tokens. PyTorch
copies all rows (tokens) twice and then overwrites the visual ones (`index_copy`). The kernel reads every text row once
for both streams, and writes every row once per stream.

Memory traffic of the kernel in bfloat16, per row of width H: 4 H bytes read and 4 H written for a visual token, 2 H
and 4 H for a text token. 24 frames of 252 tokens and 256 text tokens on an H100 (3.35 TB/s): 3B (H 2048) 102 MB,
0.031 ms; 7B (H 3584) 179 MB, 0.053 ms. Calculated, not measured on a GPU. That is about 0.1 % of a training step.
"""

# mypy: disable-error-code=no-untyped-def
# Triton interprets the annotations of a kernel itself and accepts only its own, such as tl.constexpr.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from w2r2_ds.kernels.select import Backend
from w2r2_ds.kernels.triton_compat import jit, num_blocks, power_of_two, tl

MAX_BLOCK = 4096
"""Maximum number of columns per program: 16 KiB of registers per stream in float32."""


def dual_stream_embed(
    embeddings: Tensor, positions: Tensor, shortcut: Tensor, fused: Tensor, kernels: Backend
) -> tuple[Tensor, Tensor]:
    """Insert the visual tokens of both streams into the text embeddings.

    Args:
        embeddings: ``[sequences, length, hidden]`` embeddings of the token ids, with placeholders at visual tokens.
        positions: ``[tokens]`` int64, sequence * length + position of every visual token; all different.
        shortcut: ``[tokens, hidden]`` Phi(F2D, 0); must not require a gradient.
        fused: ``[tokens, hidden]`` Phi(F2D, F3D).
        kernels: the backend.

    Returns:
        Shortcut and fused stream, ``[sequences, length, hidden]`` in the dtype of ``embeddings``. Gradients flow from
        the fused stream to ``fused`` and to the text rows of ``embeddings``; the shortcut stream has no gradient.
    """
    assert not shortcut.requires_grad, "the shortcut stream has no gradient"
    assert len(positions) == len(shortcut) == len(fused), (
        f"{len(positions)} positions, {len(shortcut)} shortcut and {len(fused)} fused tokens"
    )
    if kernels == "torch":
        return dual_stream_embed_torch(embeddings, positions, shortcut, fused)
    shortcut_stream, fused_stream = _DualStreamEmbed.apply(embeddings, positions, shortcut, fused)
    return shortcut_stream, fused_stream


def dual_stream_embed_torch(
    embeddings: Tensor, positions: Tensor, shortcut: Tensor, fused: Tensor
) -> tuple[Tensor, Tensor]:
    """`dual_stream_embed` in PyTorch."""
    rows = embeddings.flatten(0, 1)
    shortcut_stream = rows.detach().index_copy(0, positions, shortcut.to(rows.dtype))
    fused_stream = rows.index_copy(0, positions, fused.to(rows.dtype))
    return shortcut_stream.view_as(embeddings), fused_stream.view_as(embeddings)


class _DualStreamEmbed(torch.autograd.Function):
    """`dual_stream_embed` with the Triton kernel."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, positions: Tensor, shortcut: Tensor, fused: Tensor) -> Any:
        rows = embeddings.contiguous().flatten(0, 1)
        # The inverse of `positions`: row -> visual token, or -1 for text. Computed on the device, without a sync.
        token = torch.full((len(rows),), -1, dtype=torch.int32, device=rows.device)
        token[positions] = torch.arange(len(positions), dtype=torch.int32, device=rows.device)
        shortcut_stream, fused_stream = torch.empty_like(rows), torch.empty_like(rows)
        width = rows.shape[1]
        block = min(power_of_two(width), MAX_BLOCK)
        _embed[(len(rows), num_blocks(width, block))](
            rows, token, shortcut.contiguous(), fused.contiguous(), shortcut_stream, fused_stream, width, BLOCK=block
        )
        ctx.save_for_backward(positions)
        ctx.dtype = fused.dtype
        shortcut_stream, fused_stream = shortcut_stream.view_as(embeddings), fused_stream.view_as(embeddings)
        ctx.mark_non_differentiable(shortcut_stream)
        return shortcut_stream, fused_stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> Any:
        # Visual rows take their gradient from the fused tokens, text rows from the embeddings. One gather, and one copy
        # with zeroed rows if the embeddings train: a kernel of our own would not be faster than PyTorch.
        (positions,) = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        to_fused = rows.index_select(0, positions).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        to_text = rows.index_fill(0, positions, 0.0).view_as(grad) if ctx.needs_input_grad[0] else None
        return to_text, None, None, to_fused


@jit
def _embed(
    text,
    token,
    shortcut,
    fused,
    shortcut_stream,
    fused_stream,
    width,
    BLOCK: tl.constexpr,
) -> None:
    """Write `BLOCK` columns of one row to both streams: a visual token, or text if `token` is -1."""
    # int64: row * width exceeds int32 from 2**31 elements on, such as 600,000 rows of width 3584.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # `width` need not be a multiple of BLOCK: the mask keeps loads and stores inside the row.
    inside = column < width
    index = tl.load(token + row).to(tl.int64)
    target = row * width + column  # all tensors are contiguous, so `width` is the row stride
    # All threads of a program have the same row, so the branch does not diverge.
    if index < 0:
        same = tl.load(text + target, mask=inside)
        tl.store(fused_stream + target, same, mask=inside)
        tl.store(shortcut_stream + target, same, mask=inside)
    else:
        source = index * width + column
        # The tokens may have another dtype than the streams. The conversion goes through float32, which holds every
        # bfloat16 and float16 value exactly.
        with_geometry = tl.load(fused + source, mask=inside).to(tl.float32)
        tl.store(fused_stream + target, with_geometry.to(fused_stream.dtype.element_ty), mask=inside)
        without_geometry = tl.load(shortcut + source, mask=inside).to(tl.float32)
        tl.store(shortcut_stream + target, without_geometry.to(shortcut_stream.dtype.element_ty), mask=inside)
