"""Attention over segments of different lengths ("varlen"), in one call for all segments.

Tokens of all segments follow each other in one tensor. Queries of a segment attend to the keys of the same segment.
Three implementations compute the same function:

* flash-attn's `flash_attn_varlen_func`, if `model.attention` is flash_attention_2;
* PyTorch's `varlen_attn`, on GPUs and dtypes that its flash kernel supports (`has_torch_varlen`);
* scaled dot-product attention (SDPA) on batches of segments, everywhere else. The number of SDPA calls is the number of
  distinct segment lengths, not of segments.

Lengths are Python integers, so that no call waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from w2r2_ds.models.attention.causal_sdpa import grouped_sdpa

Backend = Literal["torch", "flash_attn"]
"""``torch`` is `varlen_attn` where it is supported, else SDPA; ``flash_attn`` is the package flash-attn."""
Lengths = tuple[int, ...]
"""Numbers of tokens of the segments, in order."""

GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Argument of `varlen_attn` for fewer key heads than query heads. PyTorch 2.11 accepts them without it."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    key_lengths: Lengths | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """Attention of every segment's queries over the same segment's keys.

    Args:
        query: ``[tokens, heads, head size]``.
        key, value: ``[keys, key heads, head size]``; `heads` is a multiple of `key heads`.
        lengths: numbers of queries of the segments; their sum is `tokens`.
        key_lengths: numbers of keys of the segments; None if they equal `lengths`.
        causal: the last query of a segment attends to all its keys, every query before to one key less (causal mask
            aligned to the bottom right). No segment may have more queries than keys.
        scale: factor of the scores before the softmax; None is ``head size ** -0.5``.
        backend: implementation.

    Returns:
        ``[tokens, heads, head size]``, contiguous.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    assert len(query) == sum(lengths) and len(key) == len(value) == sum(key_lengths), "the segments cover all tokens"
    if backend == "flash_attn":
        return _flash_attn(query, key, value, lengths, key_lengths, causal, scale)
    if has_torch_varlen(query.device, query.dtype, query.shape[-1]):
        return _torch_varlen(query, key, value, lengths, key_lengths, causal, scale)
    return _batched_sdpa(query, key, value, lengths, key_lengths, causal, scale)


def has_torch_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `varlen_attn` supports these tensors: a GPU of the Ampere generation or later, 16-bit floats.

    Source of the limits: PyTorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_varlen_fwd`.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, key_lengths: Lengths, causal: bool, scale: float | None
) -> Tensor:
    """`varlen_attention` with PyTorch's `varlen_attn`."""
    longest = max(key_lengths)
    # The window is (tokens to the left, tokens to the right) of the diagonal that ends at the bottom right; -1 is no
    # limit. A window of the longest segment limits nothing either. Unlike (-1, -1), it keeps PyTorch 2.14 from choosing
    # cuDNN on Hopper, which builds an execution plan for every new shape.
    window = (-1, 0) if causal else (longest, longest)
    output = varlen_attn(
        query,
        key,
        value,
        cumulative(lengths, query.device),
        cumulative(key_lengths, query.device),
        max(lengths),
        longest,
        scale=scale,
        window_size=window,
        **(GQA if query.shape[1] != key.shape[1] else {}),
    )
    return cast(Tensor, output)


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, key_lengths: Lengths, causal: bool, scale: float | None
) -> Tensor:
    """`varlen_attention` with the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cumulative(lengths, query.device),
        cu_seqlens_k=cumulative(key_lengths, query.device),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(key_lengths),
        softmax_scale=scale,
        causal=causal,  # aligned to the bottom right
    )
    return output


def _batched_sdpa(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, key_lengths: Lengths, causal: bool, scale: float | None
) -> Tensor:
    """`varlen_attention` with one SDPA call per batch of segments."""
    # Segments as views: [segment tokens, heads, head size] each.
    queries, keys, values = query.split(list(lengths)), key.split(list(key_lengths)), value.split(list(key_lengths))
    outputs: list[Tensor] = [query] * len(lengths)  # replaced below, in order of the segments
    for batch in batches(lengths, key_lengths, causal):
        q, k, v = (_stack([parts[i] for i in batch]) for parts in (queries, keys, values))
        # With as many keys as queries, the causal mask is the usual one, for which every SDPA kernel has a flag.
        square = q.shape[2] == k.shape[2]
        bias = causal_lower_right(q.shape[2], k.shape[2]) if causal and not square else None
        attended = grouped_sdpa(q, k, v, attn_mask=bias, is_causal=causal and square, scale=scale).transpose(1, 2)
        for i, output in zip(batch, attended, strict=True):
            outputs[i] = output[: lengths[i]]  # without padding
    return torch.cat(outputs)


def _stack(segments: Sequence[Tensor]) -> Tensor:
    """Segments as a batch ``[segments, heads, longest, head size]``, padded with zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(segments), batch_first=True).transpose(1, 2)


@lru_cache(maxsize=64)
def batches(lengths: Lengths, key_lengths: Lengths, causal: bool) -> tuple[tuple[int, ...], ...]:
    """Indices of the segments that share an SDPA call.

    Segments of equal lengths share one. With a causal mask, so do segments with equally many keys before their first
    query, such as the questions about one prefix: padded at the end to the longest, no token attends to the padding.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for index, (queries, keys) in enumerate(zip(lengths, key_lengths, strict=True)):
        before = keys - queries
        assert before >= 0 or not causal, "a causal segment has at least as many keys as queries"
        found.setdefault((before, 0 if causal and before else queries), []).append(index)
    return tuple(map(tuple, found.values()))


@lru_cache(maxsize=64)
def cumulative(lengths: Lengths, device: torch.device) -> Tensor:
    """Boundaries of the segments, ``[segments + 1]`` int32, from 0; cached for all layers of a pass."""
    # The first call may be an evaluation in inference mode. A training step later gets the same tensor from the cache,
    # and autograd cannot save an inference tensor for the backward pass.
    with torch.inference_mode(False):
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if device.type == "cuda":  # a copy from pinned memory is asynchronous
            ends = ends.pin_memory()
        return ends.to(device, non_blocking=True)
