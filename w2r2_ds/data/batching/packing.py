"""Layout of a micro-batch: one padded sequence per sample, or one packed sequence with all samples.

The frames come first in a prompt. Samples with the same frames therefore begin with the same tokens, which have the
same hidden states in a causal model. A packed sequence contains this shared prefix once per group of such samples,
followed by one suffix per sample (the rest of its question, and its answer)::

    [ prefix of group 0 ][ suffix 1 ][ suffix 2 ] [ prefix of group 1 ][ suffix 1 ] ...

The attention mask (`models/attention/packed.py`) is block-diagonal over groups, and a suffix attends to the
prefix of its group and to itself only. Position ids restart at every group, and every suffix continues from the end of
its prefix. So each sample has the hidden states that it would have in a sequence of its own, up to rounding.
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
        prefix_length: number of tokens of the shared prefix; all tokens of the sample if it is the only member.
    """

    members: tuple[int, ...]
    prefix_length: int


Grouping = Callable[[Sequence[Features]], list[Group]]
"""Partition of the samples of a micro-batch into groups that share a prefix."""


@dataclass(frozen=True)
class TokenPlacement:
    """Positions of one sample's tokens in a sequence.

    The prefix and the suffix are each contiguous; suffixes of other samples may lie between them.

    Attributes:
        sequence: index of the sequence in the batch.
        start: position of the sample's first token.
        prefix_length: number of tokens of the prefix.
        suffix_start: position of the first token after the prefix.
    """

    sequence: int
    start: int
    prefix_length: int
    suffix_start: int

    def positions_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions ``[n]`` int64 in the sequence of the sample's tokens with the indices `tokens`, ``[n]`` int64."""
        return tokens + torch.where(tokens < self.prefix_length, self.start, self.suffix_start - self.prefix_length)


def separate_groups(features: Sequence[Features]) -> list[Group]:
    """One group per sample."""
    return [Group((index,), len(feature.input_ids)) for index, feature in enumerate(features)]


def groups_by_frames(features: Sequence[Features]) -> list[Group]:
    """One group per frame set: samples with the same frame files in the same order share the longest common prefix.

    Samples whose geometry was changed by different random draws are in different groups.

    Raises:
        ValueError: prompts about the same frames differ before the last frame.
    """
    members: dict[object, list[int]] = {}
    for index, feature in enumerate(features):
        members.setdefault((feature.sample.frames, feature.draw), []).append(index)
    return [
        Group(tuple(indices), _shared_prefix_length([features[index] for index in indices]))
        for indices in members.values()
    ]


def _shared_prefix_length(features: Sequence[Features]) -> int:
    """Length of the prefix that samples with the same frames share; of one sample, its whole length with the answer.

    It is the longest common prefix of the prompts, without the last token of the shortest prompt.
    """
    first, *others = features
    if not others:
        return len(first.input_ids)
    # The last token of a prompt predicts the first token of the answer. It stays in the suffix even if the prompts are
    # equal: every answer position then belongs to exactly one sample.
    count = min(len(feature.input_ids) - feature.num_answer_tokens for feature in features) - 1
    for feature in others:
        different_positions = (feature.input_ids[:count] != first.input_ids[:count]).nonzero()
        count = int(different_positions[0]) if len(different_positions) else count
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
        start, bounds = end, [end, end + group.prefix_length]
        end += group.prefix_length
        for member in group.members:
            placements[member] = TokenPlacement(0, start, group.prefix_length, suffix_start=end)
            end += len(features[member].input_ids) - group.prefix_length
            bounds.append(end)
        # A single sample is all prefix; the end of its empty suffix is dropped.
        spans.append(tuple(bounds if len(group.members) > 1 else bounds[:2]))
    # `diff` of a group's bounds gives the lengths of its prefix and suffixes. repeat_interleave(lengths) repeats the
    # index i lengths[i] times: the group of every token, and in its group 0 for the prefix, n for the n-th suffix.
    # Example: a prefix of 3 tokens and suffixes of 2 and 1 tokens give the suffix_index 0 0 0 1 1 2.
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
    # Every sequence has one group without suffixes. `attention_mask - 1` is 0 (group 0) for tokens, -1 for padding.
    layout = Layout(attention_mask - 1, torch.zeros_like(attention_mask), tuple(((0, length),) for length in lengths))
    placements = [
        TokenPlacement(index, start=0, prefix_length=length, suffix_start=length)
        for index, length in enumerate(lengths)
    ]
    return layout, placements


def pack_tokens(groups: Sequence[Group], tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pack one ``[tokens]`` tensor per sample (ids or types) into ``[length]``, in the order of `packed_layout`."""
    parts = []
    for group in groups:
        first, *others = group.members
        parts += [tokens[first], *(tokens[member][group.prefix_length :] for member in others)]
    return torch.cat(parts)


def pack_position_ids(
    groups: Sequence[Group], first_member_position_ids: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Multimodal position ids of one packed sequence.

    Args:
        groups: groups whose prefixes contain all frames.
        first_member_position_ids: ``[axes, groups, longest]`` int64, those of every group's first member, padded on the
            right.
        lengths: number of tokens of every sample.

    Returns:
        ``[axes, 1, length]`` int64.
    """
    parts = []
    for index, group in enumerate(groups):
        first, *others = group.members
        of_first = first_member_position_ids[:, index]
        parts.append(of_first[:, : lengths[first]])
        for member in others:
            # A suffix is text, so its positions count up by one on all axes. They start where the suffix of the first
            # member starts, because all members have the same prefix.
            count = torch.arange(lengths[member] - group.prefix_length)
            parts.append(of_first[:, group.prefix_length, None] + count)
    return torch.cat(parts, dim=1)[:, None]
