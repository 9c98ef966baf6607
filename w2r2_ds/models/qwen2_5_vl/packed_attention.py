"""Attention for packed sequences: several samples share a sequence, but none attends to another's question or answer.

A packed sequence consists of groups. A group is a prefix (the frames that its samples share) and one suffix per sample
(question and answer):

* a prefix attends causally to itself;
* a suffix attends to its whole prefix and causally to itself. Its queries are the last of its keys, which is causal
  attention aligned to the bottom right corner.

transformers finds the attention function by its name in the text model's config, and passes the keyword arguments of
the model's forward on to it. The two functions of this file take the spans of the sequence as such a keyword (Python
integers: no host-device synchronisation) and split the attention, so that no mask ``[length, length]`` is needed.
Calls without spans (generation, padded batches) use `causal_sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from w2r2_ds.models.attention.causal_sdpa import CAUSAL_SDPA, causal_mask, causal_sdpa, grouped_sdpa
from w2r2_ds.types.batch import Layout

Spans = tuple[tuple[int, ...], ...]
"""Per group: begin and end of the prefix, end of every suffix. Groups and suffixes are contiguous."""

SPANS = "packed_spans"
"""Name of the text model's keyword argument for the spans."""

PACKED = {"sdpa": "packed_sdpa", CAUSAL_SDPA: "packed_sdpa", "flash_attention_2": "packed_varlen"}
"""Attention of the text model -> registered attention function that replaces it for packed sequences."""


def use_packed_attention(vlm: PreTrainedModel) -> None:
    """Switch the text model of a VLM to packed attention; the vision tower is not changed.

    Raises:
        ValueError: its attention has no packed form, or flash-attn is not installed.
    """
    name = vlm.model.language_model.config._attn_implementation
    if name in PACKED.values():
        return
    if name not in PACKED:
        raise ValueError(
            f"model.attention is {name}, which cannot take packed sequences; choose sdpa or flash_attention_2, or give "
            "data.questions_per_scene 1 and data.packing false."
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention is flash_attention_2, and packed sequences need the package flash-attn itself, which is "
            "not installed; install it or choose sdpa."
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


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Packed attention on SDPA, with the signature of transformers' attention functions.

    Args:
        query: ``[1, heads, length, head size]``.
        key, value: ``[1, key heads, length, head size]``.
        attention_mask: None with spans.
        packed_spans: spans of the sequence; None calls `causal_sdpa`.

    Returns:
        ``[1, length, heads, head size]``, and None in place of attention weights.
    """
    if packed_spans is None:
        return causal_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _check(query, attention_mask, dropout, packed_spans)
    # Query, key and value, each cut into prefixes and suffixes in the order of the sequence. Views, no copies.
    split = [torch.split(each, _lengths(packed_spans), dim=2) for each in (query, key, value)]
    results: list[torch.Tensor] = []
    for group in packed_spans:
        # A group of n + 1 boundaries has n parts; `results` has one tensor per part of the groups before.
        first, last = len(results), len(results) + len(group) - 1
        q, k, v = (parts[first:last] for parts in split)
        results.append(grouped_sdpa(q[0], k[0], v[0], is_causal=True, scale=scaling))
        if len(q) > 1:
            results += _suffixes(q, k, v, scaling)
    return torch.cat(results, dim=2).transpose(1, 2).contiguous(), None


def _suffixes(
    query: Sequence[torch.Tensor], key: Sequence[torch.Tensor], value: Sequence[torch.Tensor], scaling: float | None
) -> list[torch.Tensor]:
    """Outputs of all suffixes of a group from one SDPA call, ``[1, heads, tokens, head size]`` each.

    Args:
        query, key, value: parts of the group, prefix first, ``[1, heads, tokens, head size]`` each.
        scaling: factor of the scores; None is 1 / sqrt(head size).
    """
    # The suffixes form a batch, padded at the end to the longest one. No real token attends to the padding, since
    # attention is causal; the outputs of the padding are cut off.
    lengths = [each.shape[2] for each in query[1:]]
    count, longest, prefix = len(lengths), max(lengths), key[0].shape[2]

    def stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([pad(each, (0, 0, 0, longest - each.shape[2])) for each in parts[1:]])

    # Every suffix has the keys and values of the prefix before its own.
    keys, values = (torch.cat([parts[0].expand(count, -1, -1, -1), stack(parts)], dim=2) for parts in (key, value))
    # Query i attends to the keys up to prefix + i. On a GPU this bias selects flash attention's bottom-right causal
    # mode; elsewhere SDPA makes the mask [longest, prefix + longest].
    bias = causal_lower_right(longest, prefix + longest)
    output = grouped_sdpa(stack(query), keys, values, attn_mask=bias, scale=scaling)
    return [output[i : i + 1, :, :length] for i, length in enumerate(lengths)]


def packed_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Packed attention on flash-attn, as one call with variable lengths; arguments and results as `packed_sdpa`."""
    if packed_spans is None:
        return causal_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    from flash_attn import flash_attn_varlen_func

    _check(query, attention_mask, dropout, packed_spans)
    # Every prefix and every suffix is a sequence of the call. A suffix has the keys of its prefix before its own, so
    # that keys and values of a prefix are repeated once per suffix.
    lengths, key_lengths = _lengths(packed_spans), _key_lengths(packed_spans)
    keys, values = (_repeat_prefixes(each[0].transpose(0, 1), packed_spans) for each in (key, value))
    output = flash_attn_varlen_func(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        cu_seqlens_q=_ends(tuple(lengths), query.device),
        cu_seqlens_k=_ends(tuple(key_lengths), query.device),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(key_lengths),
        softmax_scale=scaling,
        causal=True,  # bottom-right aligned if there are more keys than queries
    )
    return output[None], None


def _repeat_prefixes(tokens: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Repeat every prefix before each of its suffixes: ``[length, key heads, head size]`` -> ``[keys, ...]``."""
    parts = torch.split(tokens, _lengths(spans))
    repeated: list[torch.Tensor] = []
    first = 0
    for group in spans:
        prefix, *suffixes = parts[first : first + len(group) - 1]
        repeated.append(prefix)
        for suffix in suffixes:
            repeated += [prefix, suffix]
        first += len(group) - 1
    return torch.cat(repeated)


def _lengths(spans: Spans) -> list[int]:
    """Number of tokens of every prefix and suffix, in order."""
    return [end - begin for group in spans for begin, end in pairwise(group)]


def _key_lengths(spans: Spans) -> list[int]:
    """Number of keys of every prefix (its own) and of every suffix (its prefix and its own), in order."""
    lengths = []
    for begin, prefix, *ends in spans:
        lengths.append(prefix - begin)
        lengths += [prefix - begin + end - last for last, end in pairwise([prefix, *ends])]
    return lengths


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Cumulative lengths ``[sequences + 1]`` int32 on a device, starting at 0; cached for all layers of a pass."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if device.type == "cuda":  # a copy from pinned memory is asynchronous
        ends = ends.pin_memory()
    return ends.to(device, non_blocking=True)


def _check(query: torch.Tensor, mask: torch.Tensor | None, dropout: float, spans: Spans) -> None:
    """Check that the arguments of an attention function are those of one whole packed sequence."""
    assert mask is None and not dropout, "a packed sequence has neither a mask nor dropout in its attention"
    assert query.shape[0] == 1 and query.shape[2] == spans[-1][-1], "the spans cover one whole sequence"


for _name, _function in (("packed_sdpa", packed_sdpa), ("packed_varlen", packed_varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, causal_mask)  # returns None if there is no padding mask
