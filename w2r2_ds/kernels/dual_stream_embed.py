"""Phi, dual emit: both input embeddings of the language model in one go, from F2D, the merged F3D and the text.

Torch reads and writes every row several times (an add, and for either stream a masked scatter with a prefix sum over
the mask); the kernel reads each input row once and writes each output row once, and nothing waits for the host.

Roofline, bytes of bfloat16 per row of width H: visual 2 read + 2 written = 8 H, text 1 + 2 = 6 H; H adds per visual
row, so bandwidth alone counts. 24 frames of 252 tokens + 256 of text, H100 3.35 TB/s (H200 4.3):
3B, H 2048: 102 MB, 0.031 ms (0.024); 7B, H 3584: 179 MB, 0.053 ms (0.042). Computed, never measured: no GPU was there.
That is about 0.1 % of a step, which is not what it is for: it is one code path without a read of the device.
"""

# mypy: disable-error-code=no-untyped-def
# Triton reads a kernel's annotations and knows only its own.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from w2r2_ds.kernels.select import Kernels
from w2r2_ds.kernels.triton_compat import jit, power_of_two, tl


def dual_emit(
    embeds: Tensor, slots: Tensor, visual: Tensor, other: Tensor, add: bool, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Input embeddings of the fused and of the shortcut stream.

    Args:
        embeds: ``[sequences, length, hidden]`` embeddings of the token ids.
        slots: ``[tokens]`` int64 rows of the flattened embeddings that visual tokens take, all different.
        visual: ``[tokens, hidden]`` F2D; the shortcut stream gets it as it is. No gradient goes to it.
        other: ``[tokens, hidden]`` merged geometry, or with `add` false the finished Phi(F2D, F3D) of another fusion.
        add: whether the fused stream gets ``visual + other``, in the dtype of ``visual`` as `phi.Add` has it.
        kernels: which of the two ways.

    Returns:
        fused and shortcut ``[sequences, length, hidden]`` in the dtype of ``embeds``. Gradients go through the fused
        stream, to ``other`` and to the text rows of ``embeds``; the shortcut has none.
    """
    assert not visual.requires_grad, "F2D comes from a frozen tower"
    assert len(slots) == len(visual) == len(other), f"{len(slots)} slots, {len(visual)} and {len(other)} tokens"
    if kernels == "torch":
        return emit_reference(embeds, slots, visual, other, add)
    fused, shortcut = _DualEmit.apply(embeds, slots, visual, other, add)
    return fused, shortcut


def emit_reference(embeds: Tensor, slots: Tensor, visual: Tensor, other: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """`dual_emit` in PyTorch."""
    rows = embeds.flatten(0, 1)
    tokens = visual + other.to(visual.dtype) if add else other
    fused = rows.index_copy(0, slots, tokens.to(rows.dtype))
    shortcut = rows.detach().index_copy(0, slots, visual.to(rows.dtype))
    return fused.view_as(embeds), shortcut.view_as(embeds)


class _DualEmit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, slots: Tensor, visual: Tensor, other: Tensor, add: bool) -> Any:
        rows = embeds.contiguous().flatten(0, 1)
        token = torch.full((len(rows),), -1, dtype=torch.int32, device=rows.device)
        token[slots] = torch.arange(len(slots), dtype=torch.int32, device=rows.device)
        fused, shortcut = torch.empty_like(rows), torch.empty_like(rows)
        width = rows.shape[1]
        block = min(power_of_two(width), 4096)
        grid = (len(rows), -(-width // block))
        _emit[grid](rows, token, visual.contiguous(), other.contiguous(), fused, shortcut, width, ADD=add, BLOCK=block)
        ctx.save_for_backward(slots)
        ctx.dtype = other.dtype
        fused, shortcut = fused.view_as(embeds), shortcut.view_as(embeds)
        ctx.mark_non_differentiable(shortcut)
        return fused, shortcut

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        # A gather and, where the embeddings train, a copy with zeroed rows: nothing that a kernel could save.
        (slots,) = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        to_other = rows.index_select(0, slots).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        to_text = rows.index_fill(0, slots, 0.0).view_as(grad) if ctx.needs_input_grad[0] else None
        return to_text, None, None, to_other, None


@jit
def _emit(
    text,
    token,
    visual,
    other,
    fused,
    shortcut,
    width,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row, or `BLOCK` columns of it: of a visual token, or of text where `token` is -1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    index = tl.load(token + row).to(tl.int64)
    at = row * width + column
    if index < 0:
        kept = tl.load(text + at, mask=inside)
        tl.store(fused + at, kept, mask=inside)
        tl.store(shortcut + at, kept, mask=inside)
    else:
        source = index * width + column
        seen = tl.load(visual + source, mask=inside)
        added = tl.load(other + source, mask=inside)
        if ADD:
            # Rounded where torch rounds: the operand, the sum.
            sum_ = seen.to(tl.float32) + added.to(seen.dtype).to(tl.float32)
            added = sum_.to(seen.dtype)
        tl.store(fused + at, added.to(tl.float32).to(fused.dtype.element_ty), mask=inside)
        tl.store(shortcut + at, seen.to(tl.float32).to(shortcut.dtype.element_ty), mask=inside)
