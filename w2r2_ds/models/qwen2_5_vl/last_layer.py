"""The last decoder layer for the rows that are read: keys and values of all tokens, everything else of the rows alone.

The layer's outputs for other tokens are not used, so this is exact, and saves the larger part of one layer in every
pass, forward and backward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv, rotate_half

from w2r2_ds.models.forward_override import bound
from w2r2_ds.types.batch import Layout


@dataclass(frozen=True)
class Rows:
    """The tokens of a batch that are read.

    Attributes:
        index: ``[rows]`` int64, sequence * length + position.
        visible: ``[1, 1, rows, sequences * length]`` bool, the tokens that a row sees.
    """

    index: Tensor
    visible: Tensor

    @classmethod
    def of(cls, layout: Layout, sequence: Tensor, position: Tensor) -> Rows:
        """The rows at ``[rows]`` int64 `sequence` and `position` of sequences that are laid out so.

        All sequences are searched for what a row sees, though it sees its own alone: without lengths of sequences the
        host need not wait for the device, and there are few rows.
        """
        sequences, length = layout.group.shape
        index = sequence * length + position
        token = torch.arange(sequences * length, device=index.device)
        group, suffix = layout.group.flatten(), layout.suffix.flatten()
        same = (token // length == sequence[:, None]) & (group == group[index][:, None])
        shared = (suffix == 0) | (suffix == suffix[index][:, None])
        return cls(index, (same & shared & (token <= index[:, None]))[None, None])


def rows_only(layer: Any, rows: Rows) -> AbstractContextManager[None]:
    """Inside, `layer` gives ``[rows, hidden]`` instead of ``[sequences, length, hidden]``, no other token's output.

    It is never computed again in the backward pass: it keeps less than any other layer does while that is computed
    again, and its backward pass comes first.
    """
    if layer.self_attn.sliding_window is not None:
        raise ValueError(
            "config.json of the VLM: the last layer has sliding-window attention, which is not supported; "
            "set use_sliding_window to false."
        )

    def forward(_: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **given: Any) -> Tensor:
        assert given.get("past_key_values") is None, "generation needs every token's output"
        return layer_rows(layer, rows, hidden_states, position_embeddings)

    return bound(layer, forward)


def layer_rows(layer: Any, rows: Rows, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """A Qwen2.5-VL decoder layer, its own submodules called, so that LoRA and bound kernels stay in place.

    Args:
        layer: the layer.
        rows: what is computed.
        hidden: ``[sequences, length, hidden]``, its input.
        position_embeddings: cosines and sines, ``[sequences, length, head]`` each.

    Returns:
        ``[rows, hidden]``.
    """
    attention = layer.self_attn
    tokens = hidden.flatten(0, 1)
    cos, sin = (table.flatten(0, 1) for table in position_embeddings)
    normed = layer.input_layernorm(tokens)
    own = rows.index
    query, key, value = (
        states.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for states in (
            attention.q_proj(normed.index_select(0, own)),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
    )
    query = rotated(query, cos.index_select(0, own), sin.index_select(0, own))[None]
    key, value = (repeat_kv(one[None], attention.num_key_value_groups) for one in (rotated(key, cos, sin), value))
    seen = scaled_dot_product_attention(query, key, value, attn_mask=rows.visible, scale=attention.scaling)
    states = tokens.index_select(0, own) + attention.o_proj(seen[0].transpose(0, 1).flatten(1))
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[heads, tokens, head]`` turned to its positions, ``[tokens, head]`` each."""
    turned: Tensor = heads * cos + rotate_half(heads) * sin
    return turned
