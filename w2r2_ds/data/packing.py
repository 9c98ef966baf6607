"""Layout of a micro-batch: one padded sequence per sample, or one packed sequence with all samples.

The frames come first in a prompt. Samples with the same frames therefore begin with the same tokens, which have the
same hidden states in a causal model. A packed sequence contains this shared prefix once per group of such samples,
followed by one suffix per sample (the rest of its question, and its answer)::

    [ prefix of group 0 ][ suffix 1 ][ suffix 2 ] [ prefix of group 1 ][ suffix 1 ] ...

The attention mask (`models/qwen2_5_vl/packed_attention.py`) is block-diagonal over groups, and a suffix attends to the
prefix of its group and to itself only. Position ids restart at every group, and every suffix continues from the end of
its prefix. So each sample has the hidden states that it would have in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import Layout


@dataclass(frozen=True)
class Group:
    """Samples that share a prefix of tokens.

    Attributes:
        members: indices of the samples in the micro-batch.
        prefix: number of tokens of the shared prefix; all tokens of the sample if it is the only member.
    """

    members: tuple[int, ...]
    prefix: int


Grouping = Callable[[Sequence[Features]], list[Group]]
"""Partition of the samples of a micro-batch into groups that share a prefix."""


@dataclass(frozen=True)
class TokenPlacement:
    """Position of one sample's tokens in a sequence: prefix and suffix are contiguous, with other samples in between.

    Attributes:
        sequence: index of the sequence in the batch.
        begin: position of the sample's first token.
        prefix: number of tokens of the prefix.
        suffix: position of the first token after the prefix.
    """

    sequence: int
    begin: int
    prefix: int
    suffix: int

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions ``[n]`` int64 in the sequence of the sample's tokens with the indices `tokens`, ``[n]`` int64."""
        return tokens + torch.where(tokens < self.prefix, self.begin, self.suffix - self.prefix)


def separate_groups(features: Sequence[Features]) -> list[Group]:
    """One group per sample."""
    return [Group((index,), len(feature.input_ids)) for index, feature in enumerate(features)]


def groups_by_frames(features: Sequence[Features]) -> list[Group]:
    """One group per frame set: samples with the same frame files in the same order share the longest common prefix.

    Raises:
        ValueError: a prompt has frames after its question.
    """
    members: dict[object, list[int]] = {}
    for index, feature in enumerate(features):
        members.setdefault(feature.sample.frames, []).append(index)
    return [
        Group(tuple(indices), _shared_prefix([features[index] for index in indices])) for indices in members.values()
    ]


def _shared_prefix(features: Sequence[Features]) -> int:
    """Length of the longest common prefix of the prompts; at most all but the last token of the shortest prompt."""
    first, *others = features
    if not others:
        return len(first.input_ids)
    # The last token of a prompt predicts the first token of the answer. It stays in the suffix even if the prompts are
    # equal: every answer position then belongs to exactly one sample.
    count = min(len(feature.input_ids) - feature.num_answer_tokens for feature in features) - 1
    for feature in others:
        differs = (feature.input_ids[:count] != first.input_ids[:count]).nonzero()
        count = int(differs[0]) if len(differs) else count
    for feature in features:
        if feature.token_types[count:].any():  # visual tokens in the suffix
            raise ValueError(
                f"Sample {feature.sample.id}: its prompt differs from others about the same frames before the last "
                "frame; use the chat template that came with the model, or set data.questions_per_scene to 1."
            )
    return count


def packed_layout(groups: Sequence[Group], features: Sequence[Features]) -> tuple[Layout, list[TokenPlacement]]:
    """Layout of one sequence ``[1, length]`` with all groups one after the other, and the placement of every sample."""
    placements: dict[int, TokenPlacement] = {}
    spans: list[tuple[int, ...]] = []
    end = 0
    for group in groups:
        begin, bounds = end, [end, end + group.prefix]
        end += group.prefix
        for member in group.members:
            placements[member] = TokenPlacement(sequence=0, begin=begin, prefix=group.prefix, suffix=end)
            end += len(features[member].input_ids) - group.prefix
            bounds.append(end)
        # A single sample is all prefix; the end of its empty suffix is dropped.
        spans.append(tuple(bounds if len(group.members) > 1 else bounds[:2]))
    # `diff` of a group's bounds gives the lengths of its prefix and suffixes. repeat_interleave(lengths) repeats the
    # index i lengths[i] times: the group of every token, and in its group 0 for the prefix, n for the n-th suffix.
    lengths = [torch.tensor(bounds).diff() for bounds in spans]
    group_index = torch.repeat_interleave(torch.tensor([int(parts.sum()) for parts in lengths]))
    suffix_index = torch.cat([torch.repeat_interleave(parts) for parts in lengths])
    layout = Layout(group_index[None], suffix_index[None], (tuple(spans),))
    return layout, [placements[index] for index in range(len(features))]


def padded_layout(features: Sequence[Features], attention_mask: torch.Tensor) -> tuple[Layout, list[TokenPlacement]]:
    """Layout of one sequence per sample, padded on the right, and the placement of every sample.

    Args:
        features: the samples.
        attention_mask: ``[batch, length]`` int64, 1 for tokens, 0 for padding.
    """
    lengths = [len(feature.input_ids) for feature in features]
    # Every sequence has one group, 0, without suffixes; padding is -1.
    layout = Layout(attention_mask - 1, torch.zeros_like(attention_mask), tuple(((0, length),) for length in lengths))
    placements = [
        TokenPlacement(sequence=index, begin=0, prefix=length, suffix=length) for index, length in enumerate(lengths)
    ]
    return layout, placements


def pack_tokens(groups: Sequence[Group], tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pack one ``[tokens]`` tensor per sample (ids or types) into ``[length]``, in the order of `packed_layout`."""
    parts = []
    for group in groups:
        first, *others = group.members
        parts += [tokens[first], *(tokens[member][group.prefix :] for member in others)]
    return torch.cat(parts)


def pack_position_ids(groups: Sequence[Group], firsts: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Multimodal position ids of one packed sequence.

    Args:
        groups: groups whose prefixes contain all frames.
        firsts: ``[axes, groups, longest]`` int64, position ids of every group's first member, padded on the right.
        lengths: number of tokens of every sample.

    Returns:
        ``[axes, 1, length]`` int64.
    """
    parts = []
    for index, group in enumerate(groups):
        first, *others = group.members
        parts.append(firsts[:, index, : lengths[first]])
        for member in others:
            # A suffix is text, so its positions count up by one on all axes. They start where the suffix of the first
            # member starts, because all members have the same prefix.
            count = torch.arange(lengths[member] - group.prefix)
            parts.append(firsts[:, index, group.prefix, None] + count)
    return torch.cat(parts, dim=1)[:, None]
