"""Compute the last decoder layer only for the tokens whose hidden states are used.

Keys and values are computed for all tokens; queries, attention output and MLP only for the selected ones. No later
layer needs the other outputs, so the result is exact. It saves most of one layer in every forward and backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv, rotate_half

from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.utils.forward_override import override_forward


def compute_only(layer: Any, selected: SelectedTokens) -> AbstractContextManager[None]:
    """Context in which `layer` returns ``[selected, hidden]`` instead of ``[sequences, length, hidden]``.

    Raises:
        ValueError: the layer has sliding-window attention.
    """
    if layer.self_attn.sliding_window is not None:
        raise ValueError(
            "config.json of the VLM: the last layer has sliding-window attention, which is not supported; "
            "set use_sliding_window to false."
        )

    # The layer's previous forward, and with it activation checkpointing, is not called. This layer is the first of the
    # backward pass: keeping its activations for a few tokens takes less memory than recomputing a whole layer.
    def forward(_: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **given: Any) -> Tensor:
        assert given.get("past_key_values") is None, "generation needs the outputs of all tokens"
        return forward_selected(layer, selected, hidden_states, position_embeddings)

    return override_forward(layer, forward)


def forward_selected(
    layer: Any, selected: SelectedTokens, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Forward of a Qwen2.5-VL decoder layer for selected tokens.

    Args:
        layer: the decoder layer. Its submodules are called, so that LoRA and kernels apply.
        selected: tokens whose outputs are computed.
        hidden: ``[sequences, length, hidden]``, the layer's input.
        position_embeddings: cosines and sines of the rotary positions, ``[sequences, length, head size]`` each.

    Returns:
        ``[selected, hidden]``.
    """
    attention, index = layer.self_attn, selected.index
    tokens = hidden.flatten(0, 1)
    normed = layer.input_layernorm(tokens)  # of all tokens: keys and values need it
    query, key = queries_and_keys(layer, selected, normed, position_embeddings)
    value = split_heads(attention.v_proj(normed), attention.head_dim)
    query, (key, value) = query[None], (repeat_kv(one[None], attention.num_key_value_groups) for one in (key, value))
    query = pad(query, (0, 0, 0, selected.mask.shape[2] - len(index)))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=selected.mask, scale=attention.scaling)
    # The rest of the layer is token-wise: residual, output projection and MLP of the selected tokens only.
    states = tokens.index_select(0, index) + attention.o_proj(attended[0, :, : len(index)].transpose(0, 1).flatten(1))
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def queries_and_keys(
    layer: Any, selected: SelectedTokens, normed: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated queries ``[heads, selected, head size]`` and keys ``[key heads, tokens, head size]`` of a layer.

    Args:
        layer: the decoder layer.
        selected: tokens whose queries are computed.
        normed: ``[tokens, hidden]``, output of the layer's first norm for the tokens of all sequences.
        position_embeddings: as in `forward_selected`.
    """
    attention, index = layer.self_attn, selected.index
    cos, sin = (table.flatten(0, 1) for table in position_embeddings)
    query = split_heads(attention.q_proj(normed.index_select(0, index)), attention.head_dim)
    key = split_heads(attention.k_proj(normed), attention.head_dim)
    return rotated(query, cos.index_select(0, index), sin.index_select(0, index)), rotated(key, cos, sin)


def split_heads(states: Tensor, head_size: int) -> Tensor:
    """``[tokens, heads * head size]`` -> ``[heads, tokens, head size]``."""
    return states.unflatten(-1, (-1, head_size)).transpose(0, 1)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to ``[heads, tokens, head size]``; `cos` and `sin` ``[tokens, head size]``."""
    result: Tensor = heads * cos + rotate_half(heads) * sin
    return result
