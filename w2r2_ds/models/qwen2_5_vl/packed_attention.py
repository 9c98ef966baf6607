"""Attention of packed sequences: several samples in one sequence, none of which sees another's question or answer.

Transformers calls a registered function by its name in the text model's config, and hands it what the stock forward is
given as a keyword: here the spans of the sequence, host integers. No mask is made. Each prefix is causal; each suffix
sees its prefix and, causally, itself, so that its keys are both and its queries the last of them (bottom-right causal).
Calls without spans (generation, padded batches) are SDPA's as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from w2r2_ds.types.batch import Layout

Spans = tuple[tuple[int, ...], ...]
"""Per group: begin, end of the prefix, end of every suffix. Groups follow each other without a gap."""

SPANS = "scene_spans"
"""The keyword that carries them through the stock forward."""

SPLIT = {"sdpa": "scene_split", "flash_attention_2": "scene_split_varlen"}
"""`model.attention` -> what packed sequences need in its place."""


def use_scene_split(vlm: PreTrainedModel) -> None:
    """Let the language model of a transformers VLM take packed sequences; its vision tower stays as it is.

    Raises:
        ValueError: its attention cannot be split.
    """
    name = vlm.model.language_model.config._attn_implementation
    if name in SPLIT.values():
        return
    if name not in SPLIT:
        raise ValueError(
            f"model.attention is {name}, which cannot take packed sequences; choose {' or '.join(SPLIT)}, or give "
            "data.questions_per_scene 1 and data.packing false."
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(
            "model.attention is flash_attention_2, and packed sequences need the package flash-attn itself, which is "
            "not installed; install it or choose sdpa."
        )
    vlm.set_attn_implementation({"text_config": SPLIT[name]})
    found = vlm.model.language_model.config._attn_implementation
    assert found == SPLIT[name], f"transformers left the text model's attention at {found}"


def attention_inputs(vlm: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """What the stock forward is told about who sees whom: the spans of a packed sequence, or nothing.

    Attention is causal, and padding comes after all tokens that are read, so that it needs no mask.
    """
    spans = layout.spans
    packed = len(spans) == 1 and vlm.model.language_model.config._attn_implementation in SPLIT.values()
    if packed:
        return {"attention_mask": None, SPANS: spans[0]}
    # Without spans a token would see all before it, whatever its sample.
    assert all(len(groups) == 1 and len(groups[0]) == 2 for groups in spans), "a packed batch needs `use_scene_split`"
    return {"attention_mask": None}


def scene_split(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    scene_spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A transformers attention function on SDPA.

    Args:
        query: ``[1, heads, length, size]``.
        key, value: ``[1, key heads, length, size]``.
        attention_mask: None where there are spans.
        scene_spans: of the sequence; None calls SDPA as transformers does.

    Returns:
        ``[1, length, heads, size]`` and None (no weights).
    """
    if scene_spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _check(query, attention_mask, dropout, scene_spans)
    split = [torch.split(each, _lengths(scene_spans), dim=2) for each in (query, key, value)]
    results: list[torch.Tensor] = []
    for group in scene_spans:
        first, last = len(results), len(results) + len(group) - 1
        q, k, v = (parts[first:last] for parts in split)
        options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        results.append(scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True, **options))
        if len(q) > 1:
            results += _suffixes(q, k, v, options)
    return torch.cat(results, dim=2).transpose(1, 2).contiguous(), None


def _suffixes(
    query: Sequence[torch.Tensor], key: Sequence[torch.Tensor], value: Sequence[torch.Tensor], options: dict[str, Any]
) -> list[torch.Tensor]:
    """Outputs of the suffixes of a group, from its prefix and suffixes, by one call.

    They are padded at their ends to the longest: causality hides the padding from everyone but itself.
    """
    lengths = [each.shape[2] for each in query[1:]]
    count, longest, prefix = len(lengths), max(lengths), key[0].shape[2]

    def stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([pad(each, (0, 0, 0, longest - each.shape[2])) for each in parts[1:]])

    keys, values = (torch.cat([parts[0].expand(count, -1, -1, -1), stack(parts)], dim=2) for parts in (key, value))
    # On a GPU flash's own bottom-right causality, elsewhere a mask of [longest, prefix + longest].
    bias = causal_lower_right(longest, prefix + longest)
    output = scaled_dot_product_attention(stack(query), keys, values, attn_mask=bias, **options)
    return [output[i : i + 1, :, :length] for i, length in enumerate(lengths)]


def scene_split_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    scene_spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`scene_split` on flash-attn: prefixes and suffixes of all groups are sequences of one variable-length call."""
    if scene_spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    from flash_attn import flash_attn_varlen_func

    _check(query, attention_mask, dropout, scene_spans)
    lengths, seen = _lengths(scene_spans), _key_lengths(scene_spans)
    keys, values = (_repeat_prefixes(each[0].transpose(0, 1), scene_spans) for each in (key, value))
    output = flash_attn_varlen_func(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        cu_seqlens_q=_ends(tuple(lengths), query.device),
        cu_seqlens_k=_ends(tuple(seen), query.device),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(seen),
        softmax_scale=scaling,
        causal=True,  # bottom-right, where there are more keys than queries
    )
    return output[None], None


def _repeat_prefixes(tokens: torch.Tensor, spans: Spans) -> torch.Tensor:
    """``[length, key heads, size]`` -> ``[keys, key heads, size]``: every prefix, and again before each suffix."""
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
    """Tokens of every prefix and suffix, in order."""
    return [end - begin for group in spans for begin, end in pairwise(group)]


def _key_lengths(spans: Spans) -> list[int]:
    """How many keys every prefix and suffix has: itself, and a suffix its prefix too."""
    seen = []
    for begin, prefix, *ends in spans:
        seen.append(prefix - begin)
        seen += [prefix - begin + end - last for last, end in pairwise([prefix, *ends])]
    return seen


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``[sequences + 1]`` int32 where sequences of these lengths begin and end; the same for all layers of a pass."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if device.type == "cuda":  # a copy from pinned memory does not block
        ends = ends.pin_memory()
    return ends.to(device, non_blocking=True)


def _check(query: torch.Tensor, mask: torch.Tensor | None, dropout: float, spans: Spans) -> None:
    assert mask is None and not dropout, "a packed sequence has neither a mask nor dropout in its attention"
    assert query.shape[0] == 1 and query.shape[2] == spans[-1][-1], "the spans are those of one whole sequence"


for _name, _function in (("scene_split", scene_split), ("scene_split_varlen", scene_split_varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)  # makes none where no padding mask is given
