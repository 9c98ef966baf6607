"""Attention for packed sequences: several samples share a sequence, but none attends to another's question or answer.

A packed sequence consists of groups. A group is a prefix (the frames that its samples share) and one suffix per sample
(question and answer):

* a prefix attends causally to itself;
* a suffix attends to its whole prefix and causally to itself. Its queries are the last of its keys, which is causal
  attention aligned to the bottom right corner.

Prefixes and suffixes are the segments of one `varlen_attention`, so that no mask ``[length, length]`` is needed.
transformers finds the attention function by its name in the text model's config, and passes the keyword arguments of
the model's forward on to it. The functions of this file take the spans of the sequence as such a keyword (Python
integers: no host-device synchronisation). Calls without spans (generation, padded batches) use `causal_sdpa`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from w2r2_ds.models.attention.causal_sdpa import CAUSAL_SDPA, causal_mask, causal_sdpa
from w2r2_ds.models.attention.varlen import Backend, Lengths, varlen_attention
from w2r2_ds.types.batch import Layout

Spans = tuple[tuple[int, ...], ...]
"""Per group: begin and end of the prefix, end of every suffix. Groups and suffixes are contiguous."""

SPANS = "packed_spans"
"""Name of the text model's keyword argument for the spans."""

PACKED = {"sdpa": "packed_sdpa", CAUSAL_SDPA: "packed_sdpa", "flash_attention_2": "packed_flash_attn"}
"""Attention of the text model -> registered attention function that replaces it for packed sequences."""


def use_packed_attention(vlm: PreTrainedModel) -> None:
    """Switch the text model of a VLM to packed attention; the vision tower is not changed.

    Raises:
        ValueError: its attention has no packed form.
    """
    name = vlm.model.language_model.config._attn_implementation
    if name in PACKED.values():
        return
    if name not in PACKED:
        raise ValueError(
            f"model.attention is {name}, which cannot take packed sequences; choose sdpa or flash_attention_2, or give "
            "data.questions_per_scene 1 and data.packing false."
        )
    vlm.set_attn_implementation({"text_config": PACKED[name]})
    found = vlm.model.language_model.config._attn_implementation
    assert found == PACKED[name], f"transformers left the text model's attention at {found}"


def attention_inputs(vlm: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """Attention arguments of the text model's forward: the spans of a packed sequence, and no mask."""
    # Padding needs no mask: it comes after all tokens whose states are used, and attention is causal.
    spans = layout.spans
    packed = len(spans) == 1 and vlm.model.language_model.config._attn_implementation in PACKED.values()
    if packed:
        # So the padding of a packed sequence can belong to its last span.
        *groups, (*last, _) = spans[0]
        return {"attention_mask": None, SPANS: (*groups, (*last, layout.group.shape[1]))}
    # Without spans, a token would attend to all tokens before it, including those of other samples.
    assert all(len(groups) == 1 and len(groups[0]) == 2 for groups in spans), (
        "a packed batch needs `use_packed_attention`"
    )
    return {"attention_mask": None}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_spans: Spans | None = None,
    *,
    backend: Backend = "torch",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Packed attention, with the signature of transformers' attention functions.

    Args:
        query: ``[1, heads, length, head size]``.
        key, value: ``[1, key heads, length, head size]``.
        attention_mask: None with spans.
        packed_spans: spans of the sequence; None calls `causal_sdpa`.
        backend: implementation of `varlen_attention`.

    Returns:
        ``[1, length, heads, head size]``, and None in place of attention weights.
    """
    if packed_spans is None:
        return causal_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert attention_mask is None and not dropout, "a packed sequence has neither a mask nor dropout in its attention"
    assert query.shape[0] == 1 and query.shape[2] == packed_spans[-1][-1], "the spans cover one whole sequence"
    tokens = [each[0].transpose(0, 1) for each in (query, key, value)]  # [length, heads, head size]
    # A suffix has the keys of its prefix before its own, so that those of a prefix are repeated once per suffix.
    keys, values = (repeat_prefixes(each, packed_spans) for each in tokens[1:])
    lengths, key_lengths = segment_lengths(packed_spans)
    output = varlen_attention(
        tokens[0].contiguous(), keys, values, lengths, key_lengths, causal=True, scale=scaling, backend=backend
    )
    return output[None], None


def repeat_prefixes(tokens: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Repeat every prefix before each of its suffixes: ``[length, key heads, head size]`` -> ``[keys, ...]``."""
    parts = torch.split(tokens, list(segment_lengths(spans)[0]))
    repeated: list[torch.Tensor] = []
    first = 0
    for group in spans:
        prefix, *suffixes = parts[first : first + len(group) - 1]
        repeated.append(prefix)
        for suffix in suffixes:
            repeated += [prefix, suffix]
        first += len(group) - 1
    return torch.cat(repeated)


def segment_lengths(spans: Spans) -> tuple[Lengths, Lengths]:
    """Numbers of queries and of keys of every prefix (its own tokens) and every suffix (keys: also its prefix's)."""
    queries, keys = [], []
    for begin, prefix, *ends in spans:
        for last, end in pairwise([begin, prefix, *ends]):
            queries.append(end - last)
            keys.append(end - last + (prefix - begin if last > begin else 0))
    return tuple(queries), tuple(keys)


_BACKENDS: dict[str, Backend] = {"packed_sdpa": "torch", "packed_flash_attn": "flash_attn"}
for _name, _backend in _BACKENDS.items():
    AttentionInterface.register(_name, partial(packed_attention, backend=_backend))
    AttentionMaskInterface.register(_name, causal_mask)  # returns None if there is no padding mask
