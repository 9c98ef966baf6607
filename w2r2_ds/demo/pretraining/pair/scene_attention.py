"""Decoder on packed questions: all questions about a room share the tokens of its frames, which are computed once.

A row is the prefix (system turn and frames), followed by blocks of equal length, one per question with its answer. A
token attends causally to its own block and to the whole prefix; blocks do not attend to each other. So the states of a
question are those of a sequence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache

SCENE_ATTENTION = "scene_attention"
"""Name under which transformers finds `scene_attention`."""


@dataclass(frozen=True)
class Blocks:
    """Layout of a row.

    Attributes:
        prefix: tokens of the prefix.
        count: number of blocks.
        length: tokens of a block.
    """

    prefix: int
    count: int
    length: int


def scene_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    blocks: Blocks | None = None,
    maps: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' signature; causal without `blocks`.

    Args:
        module: not used.
        query: ``[rows, heads, tokens, head size]``; a single token if earlier tokens are cached.
        key, value: ``[rows, key heads, tokens, head size]``.
        attention_mask: must be None.
        scaling: factor on the scores.
        dropout: must be 0.
        blocks: layout of the rows; None for one sequence per row.
        maps: list to which the weights of the prefix's tokens, ``[rows, heads, blocks, length, prefix]``, are appended.
        kwargs: not used.

    Returns:
        ``[rows, tokens, heads, head size]``; None, in place of attention weights.
    """
    assert attention_mask is None and dropout == 0.0
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if blocks is None:
        causal = query.shape[2] > 1
        output = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
        return output.transpose(1, 2), None
    rows, heads, _, size = query.shape
    (query_prefix, query_own), (key_prefix, key_own), (value_prefix, value_own) = (
        (each[:, :, : blocks.prefix], each[:, :, blocks.prefix :]) for each in (query, key, value)
    )
    of_prefix = scaled_dot_product_attention(query_prefix, key_prefix, value_prefix, is_causal=True, scale=scaling)
    split = (rows, heads, blocks.count, blocks.length)
    to_prefix = ((query_own * scaling) @ key_prefix.mT).view(*split, blocks.prefix)
    to_own = (query_own.reshape(*split, size) * scaling) @ key_own.reshape(*split, size).mT
    to_own = to_own + torch.full((blocks.length, blocks.length), float("-inf")).triu(1)
    weights = torch.cat([to_prefix, to_own], -1).softmax(-1)
    prefix_weights, own_weights = weights.split([blocks.prefix, blocks.length], -1)
    if maps is not None:
        maps.append(prefix_weights)
    of_own = prefix_weights.reshape(rows, heads, -1, blocks.prefix) @ value_prefix
    of_own = of_own + (own_weights @ value_own.reshape(*split, size)).view(rows, heads, -1, size)
    return torch.cat([of_prefix, of_own], 2).transpose(1, 2), None


AttentionInterface.register(SCENE_ATTENTION, scene_attention)


def run_layers(
    text: Any,
    embeddings: Tensor,
    positions: Tensor,
    *,
    begin: int = 0,
    end: int | None = None,
    blocks: Blocks | None = None,
    maps: list[Tensor] | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Decoder layers ``[begin, end)`` of a language model whose attention is `SCENE_ATTENTION`.

    Args:
        text: Qwen2.5-VL's language model.
        embeddings: ``[rows, tokens, hidden]`` input of the first of these layers.
        positions: ``[3, rows, tokens]`` rotary positions.
        begin, end: numbers of layers.
        blocks, maps: see `scene_attention`.
        cache: keys and values of earlier tokens; extended.

    Returns:
        ``[rows, tokens, hidden]`` output of the last of these layers, without the final norm.
    """
    rotary = text.rotary_emb(embeddings, positions)
    states = embeddings
    for layer in text.layers[begin:end]:
        states = layer(
            states,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
            blocks=blocks,
            maps=maps,
        )
    return states
