"""Attention of the language model on PyTorch's `scaled_dot_product_attention` (SDPA), without masks or scores [L, L].

transformers' ``sdpa`` allocates tensors of ``length ** 2`` elements in two cases, which this file avoids:

* Prompts of different lengths, padded on the left, get a mask ``[batch, 1, length, length]``. Here every prompt attends
  causally to its own tokens, one SDPA call per prompt.
* Fewer key heads than query heads (grouped-query attention) in float32 on a GPU: SDPA has no fused kernel for them and
  computes all scores ``[batch, heads, length, length]``. Here keys and values are repeated instead, so that
  memory-efficient attention runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import pack_gqa, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

CAUSAL_SDPA = "causal_sdpa"
"""Name under which transformers finds `causal_sdpa` and `causal_mask`."""


def use_causal_sdpa(text: PreTrainedModel) -> None:
    """Let a text model with the attention ``sdpa`` use `causal_sdpa`; leave other attention implementations."""
    if text.config._attn_implementation == "sdpa":
        text.set_attn_implementation(CAUSAL_SDPA)


def has_fused_gqa(device: str, dtype: torch.dtype) -> bool:
    """Whether SDPA has a fused kernel for grouped-query attention.

    On a GPU only flash attention takes fewer key heads than query heads, and it takes 16-bit floats only; memory-
    efficient attention does not (`check_batch_size_and_num_heads_dense<supports_gqa>` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13). On a CPU, flash attention takes all dtypes.
    """
    return device != "cuda" or dtype in (torch.float16, torch.bfloat16)


def grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA with a fused kernel, also for fewer key heads than query heads.

    Args:
        query: ``[batch, heads, queries, head size]``.
        key, value: ``[batch, key heads, keys, head size]``; `heads` is a multiple of `key heads`.
        options: further arguments of SDPA, such as `is_causal`, `scale` or a mask without a dimension of heads.

    Returns:
        ``[batch, heads, queries, head size]``.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and has_fused_gqa(query.device.type, query.dtype):
        return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    return scaled_dot_product_attention(query, repeat_kv(key, repeats), repeat_kv(value, repeats), **options)


def causal_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of padded sequences, with the signature of transformers' attention functions.

    Args:
        query: ``[batch, heads, queries, head size]``.
        key, value: ``[batch, key heads, keys, head size]``.
        attention_mask: result of `causal_mask`.

    Returns:
        ``[batch, queries, heads, head size]``, and None in place of attention weights. 0 for padding of a prompt.
    """
    given = {name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None}
    assert not given, f"the language model has {given}, which this attention does not compute"
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if attention_mask is not None and attention_mask.ndim > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.shape[2] == 1:  # one decoded token, which attends to all tokens: the heads of a group become queries
        output = scaled_dot_product_attention(pack_gqa(query, query.shape[1] // key.shape[1]), key, value, **options)
        output = output.reshape(query.shape)
    elif attention_mask is None:
        output = grouped_sdpa(query, key, value, is_causal=True, **options)
    else:
        prompts = []
        for index, padding in enumerate(attention_mask.tolist()):
            own = (states[index : index + 1, :, padding:] for states in (query, key, value))
            prompts.append(pad(grouped_sdpa(*own, is_causal=True, **options), (0, 0, padding, 0)))
        output = torch.cat(prompts)
    return output.transpose(1, 2).contiguous(), None


def causal_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `causal_sdpa`, with the signature of transformers' mask functions; called once per forward pass.

    Args:
        q_length, kv_length: number of queries and keys; equal for a prompt without cached tokens.
        mask_function: transformers' rule, causal or another one.
        attention_mask: ``[batch, keys]`` bool, False for padding.

    Returns:
        ``[batch]`` int64 number of padding tokens of every prompt, on the CPU, if there are prompts padded on the left;
        else the result of transformers' `sdpa_mask`: None without padding, ``[batch, 1, 1, keys]`` for a decoded token.
    """
    if attention_mask is not None and mask_function is causal_mask_function and 1 < q_length == kv_length:
        # The host needs the lengths to cut the prompts: one synchronization per batch of prompts.
        is_token = attention_mask.cpu()
        padding = kv_length - is_token.sum(1)
        on_the_left = bool((is_token == (torch.arange(kv_length) >= padding[:, None])).all())
        if on_the_left and padding.any() and padding.max() < kv_length:
            return padding
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(CAUSAL_SDPA, causal_sdpa)
AttentionMaskInterface.register(CAUSAL_SDPA, causal_mask)
