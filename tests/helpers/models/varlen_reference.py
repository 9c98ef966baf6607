"""Attention over segments, written out segment by segment; and flash attention's kernels as documented, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from w2r2_ds.models.attention import varlen


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, key_lengths: Any, window: tuple[int, int], scale: float | None
) -> Tensor:
    """Softmax attention within segments, ``[tokens, heads, head size]``.

    Args:
        q: ``[tokens, heads, head size]``; k and v have the keys, and as many or fewer heads.
        lengths, key_lengths: tokens and keys of the segments.
        window: visible keys to the left and to the right of the diagonal that ends at the bottom right; -1 for all.
        scale: factor of the scores; None for ``head size ** -0.5``.
    """
    results = []
    for query, key, value in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
        shared = q.shape[1] // k.shape[1]
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * (q.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(len(key)) - torch.arange(len(query))[:, None] - (len(key) - len(query))
        left, right = (len(key) if side < 0 else side for side in window)
        scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(results)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` as documented by flash-attn 2.

    Packed tokens, int32 cumulative lengths, fewer key heads than query heads, causal mask aligned to the bottom right.
    """
    assert not dropout_p
    lengths, key_lengths = check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return segment_attention(q, k, v, lengths, key_lengths, (-1, 0 if causal else -1), softmax_scale)


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> tuple[Any, Any]:
    """Check arguments as flash attention's kernels do; returns the lengths of the segments."""
    assert q.ndim == k.ndim == v.ndim == 3 and q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert cu_q[0] == cu_k[0] == 0 and len(cu_q) == len(cu_k)
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    return cu_q.diff().tolist(), cu_k.diff().tolist()


@contextmanager
def flash_attn_package() -> Iterator[None]:
    """Context with a package flash_attn that has `flash_attn_varlen_func` only."""
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    with patch.dict(sys.modules, {"flash_attn": module}):
        yield


@contextmanager
def torch_varlen_on_cpu() -> Iterator[list[int]]:
    """Context in which PyTorch's `varlen_attn` runs on the CPU; yields a list with the longest segment of every call.

    Everything above ATen's flash attention operators is PyTorch's: custom operator, autograd and their arguments.
    """
    calls: list[int] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any, **given: Any
    ) -> Any:
        assert not given.keys() - {"scale", "window_size_left", "window_size_right"}
        dropout, causal, *_ = rest
        assert not dropout
        calls.append(max_q)
        lengths, key_lengths = check(q, k, v, cu_q, cu_k, max_q, max_k)
        window = window_of(causal, given, max_k)
        out = segment_attention(q, k, v, lengths, key_lengths, window, given.get("scale"))
        unused = q.new_empty(0)
        return out, q.new_empty(q.shape[1], len(q), dtype=torch.float32), unused, unused, unused

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        *rest: Any,
        **given: Any,
    ) -> Any:
        max_q, max_k, _, causal, *_ = rest
        lengths, key_lengths = check(q, k, v, cu_q, cu_k, max_q, max_k)
        window = window_of(causal, given, max_k)

        def gradients() -> Any:
            inputs = [each.detach().clone().requires_grad_() for each in (q, k, v)]
            again = segment_attention(*inputs, lengths, key_lengths, window, given.get("scale"))  # type: ignore[misc]
            return torch.autograd.grad(again, inputs, grad)

        # In a thread of its own: autograd is switched off where an operator's kernel runs.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(gradients).result()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        with patch.object(varlen, "has_torch_varlen", lambda *_: True):
            yield calls
    finally:
        library._destroy()


def window_of(causal: bool, given: Any, max_k: int) -> tuple[int, int]:
    """Window of the kernel: a side of at least the longest segment is no limit (flash_api.cpp, `mha_varlen_fwd`)."""
    left, right = given.get("window_size_left", -1), 0 if causal else given.get("window_size_right", -1)
    return (-1 if left >= max_k else left, -1 if right >= max_k else right)
