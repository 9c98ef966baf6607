"""Attention weights of selected tokens in a Qwen2.5-VL decoder layer, without those of all other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.models.attention.selected_tokens import BLOCK_ROWS, SelectedTokens
from w2r2_ds.models.qwen2_5_vl.last_layer import queries_and_keys


@torch.no_grad()
def row_attention(
    layer: Any, selected: SelectedTokens, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Iterator[Tensor]:
    """Attention weights of the selected tokens, in blocks; no score ``[length, length]`` of a sequence is computed.

    These are the weights with which the layer itself sums the values: the same projections (with LoRA), the same rotary
    positions and the same mask. Fused attention kernels do not return them.

    Args:
        layer: the decoder layer.
        selected: tokens whose weights are computed.
        hidden: ``[sequences, length, hidden]``, the layer's input.
        position_embeddings: cosines and sines of the rotary positions, ``[sequences, length, head size]`` each.

    Yields:
        ``[heads, rows, sequences * length]`` float32 without gradient, of consecutive selected tokens, at most
        ``BLOCK_ROWS``; the last dimension sums to 1.

    Raises:
        ValueError: the layer has sliding-window attention, which `SelectedTokens.mask` does not describe.
    """
    attention = layer.self_attn
    if attention.sliding_window is not None:
        raise ValueError(
            f"config.json of the VLM: layer {attention.layer_idx} has sliding-window attention, whose weights are not "
            "supported; set use_sliding_window to false."
        )
    query, key = queries_and_keys(layer, selected, layer.input_layernorm(hidden.flatten(0, 1)), position_embeddings)
    # Grouped-query attention: consecutive query heads share a key head.
    groups = query.unflatten(0, (len(key), -1))  # [key heads, heads per key head, selected, head size]
    visible = selected.mask[0, 0, : len(selected.index)]
    # The weights of all selected tokens at once would grow with the square of the micro-batch.
    for rows, is_visible in zip(groups.split(BLOCK_ROWS, dim=2), visible.split(BLOCK_ROWS), strict=True):
        scores = (rows @ key[:, None].transpose(-1, -2)).flatten(0, 1) * attention.scaling
        yield scores.masked_fill(~is_visible, -torch.inf).softmax(-1, dtype=torch.float32)
