"""Compute the last decoder layer only for the tokens whose hidden states are used.

Keys and values are computed for all tokens; queries, attention output and MLP only for the selected ones. No later
layer needs the other outputs, so the result is exact. It saves most of one layer in every forward and backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv, rotate_half

from w2r2_ds.types.batch import Layout
from w2r2_ds.utils.forward_override import override_forward

ROW_MULTIPLE = 32
"""The queries of the attention are padded with zeros to a multiple of this number.

Every micro-batch selects another number of tokens, usually 30 to 100 per sample. Together with
`data.loader.LENGTH_MULTIPLE`, rounding leaves few shapes of the attention, whose memory PyTorch's caching allocator
reuses. It costs 16 queries of attention on average; the linear layers have no more rows.
"""


@dataclass(frozen=True)
class SelectedTokens:
    """Selected tokens of a batch, such as its answer tokens, and their attention mask.

    Attributes:
        index: ``[selected]`` int64 index into the flattened tokens, sequence * length + position.
        mask: ``[1, 1, rows, sequences * length]`` bool; True where a selected token attends to a token. The number of
            rows is that of selected tokens, rounded up to a multiple of `ROW_MULTIPLE`; further rows are True.
    """

    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, layout: Layout, sequence: Tensor, position: Tensor) -> SelectedTokens:
        """Select tokens by their ``[selected]`` int64 `sequence` and `position` in sequences of this layout."""
        sequences, length = layout.group.shape
        index = sequence * length + position
        # The mask covers the tokens of all sequences, although a token attends only to its own one. Gathering the keys
        # per sequence would need sizes on the host, which waits for the device; and few tokens are selected.
        token = torch.arange(sequences * length, device=index.device)
        group, suffix = layout.group.flatten(), layout.suffix.flatten()
        # The rule of `Layout`: same sequence and group, in the prefix or in the own suffix, and not a later token.
        same_group = (token // length == sequence[:, None]) & (group == group[index][:, None])
        shared = (suffix == 0) | (suffix == suffix[index][:, None])
        mask = same_group & shared & (token <= index[:, None])
        # True, because the softmax of a row without keys is NaN.
        return cls(index, pad(mask, (0, 0, 0, -len(index) % ROW_MULTIPLE), value=True)[None, None])


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
    cos, sin = (table.flatten(0, 1) for table in position_embeddings)
    normed = layer.input_layernorm(tokens)  # of all tokens: keys and values need it
    query, key, value = (
        # [tokens, heads * head size] -> [heads, tokens, head size]
        states.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for states in (
            attention.q_proj(normed.index_select(0, index)),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
    )
    query = rotated(query, cos.index_select(0, index), sin.index_select(0, index))[None]
    key, value = (repeat_kv(one[None], attention.num_key_value_groups) for one in (rotated(key, cos, sin), value))
    query = pad(query, (0, 0, 0, selected.mask.shape[2] - len(index)))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=selected.mask, scale=attention.scaling)
    # The rest of the layer is token-wise: residual, output projection and MLP of the selected tokens only.
    states = tokens.index_select(0, index) + attention.o_proj(attended[0, :, : len(index)].transpose(0, 1).flatten(1))
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to ``[heads, tokens, head size]``; `cos` and `sin` ``[tokens, head size]``."""
    result: Tensor = heads * cos + rotate_half(heads) * sin
    return result
