"""Compute the last decoder layer only at the positions whose hidden states are used.

Keys and values are computed for all tokens; queries, attention output and MLP only for the selected ones. No later
layer needs the other outputs, so the result is exact. It saves most of one layer in every forward and backward pass.
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
    """Selected tokens of a batch (rows of its flattened hidden states).

    Attributes:
        index: ``[rows]`` int64, sequence * length + position.
        visible: ``[1, 1, rows, sequences * length]`` bool attention mask: the tokens that a row attends to.
    """

    index: Tensor
    visible: Tensor

    @classmethod
    def of(cls, layout: Layout, sequence: Tensor, position: Tensor) -> Rows:
        """Rows at ``[rows]`` int64 `sequence` and `position` of sequences with this layout.

        The mask covers the tokens of all sequences, although a row attends only to its own one: a variable length would
        force the host to wait for the device, and there are few rows.
        """
        sequences, length = layout.group.shape
        index = sequence * length + position
        token = torch.arange(sequences * length, device=index.device)
        group, suffix = layout.group.flatten(), layout.suffix.flatten()
        # The rule of `Layout`: same sequence and group, in the prefix or in the own suffix, and not after the row.
        same = (token // length == sequence[:, None]) & (group == group[index][:, None])
        shared = (suffix == 0) | (suffix == suffix[index][:, None])
        return cls(index, (same & shared & (token <= index[:, None]))[None, None])


def rows_only(layer: Any, rows: Rows) -> AbstractContextManager[None]:
    """Context in which `layer` returns ``[rows, hidden]`` instead of ``[sequences, length, hidden]``.

    The override bypasses activation checkpointing: the layer is the first of the backward pass, and its activations for
    a few rows take less memory than the recomputation of a whole layer.

    Raises:
        ValueError: the layer has sliding-window attention.
    """
    if layer.self_attn.sliding_window is not None:
        raise ValueError(
            "config.json of the VLM: the last layer has sliding-window attention, which is not supported; "
            "set use_sliding_window to false."
        )

    def forward(_: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **given: Any) -> Tensor:
        assert given.get("past_key_values") is None, "generation needs the outputs of all tokens"
        return layer_rows(layer, rows, hidden_states, position_embeddings)

    return bound(layer, forward)


def layer_rows(layer: Any, rows: Rows, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Forward of a Qwen2.5-VL decoder layer for some rows; calls its submodules, so that LoRA and kernels apply.

    Args:
        layer: the decoder layer.
        rows: tokens whose outputs are computed.
        hidden: ``[sequences, length, hidden]``, the layer's input.
        position_embeddings: cosines and sines of the rotary positions, ``[sequences, length, head size]`` each.

    Returns:
        ``[rows, hidden]``.
    """
    attention = layer.self_attn
    tokens = hidden.flatten(0, 1)
    cos, sin = (table.flatten(0, 1) for table in position_embeddings)
    normed = layer.input_layernorm(tokens)  # of all tokens: keys and values need it
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
    attended = scaled_dot_product_attention(query, key, value, attn_mask=rows.visible, scale=attention.scaling)
    states = tokens.index_select(0, own) + attention.o_proj(attended[0].transpose(0, 1).flatten(1))
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to ``[heads, tokens, head size]``; `cos` and `sin` ``[tokens, head size]``."""
    result: Tensor = heads * cos + rotate_half(heads) * sin
    return result
