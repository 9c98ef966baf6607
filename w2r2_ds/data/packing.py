"""Layout of a micro-batch: every sample in a padded sequence of its own, or all samples packed into one sequence.

The frames come first in a prompt, so samples about the same frames begin with the same tokens, and in a causal model
these have the same hidden states. In a packed sequence such a group of samples has this prefix once, followed by one
suffix per sample (the rest of its question, and its answer)::

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
        prefix: length of the shared prefix; all tokens if there is only one member.
    """

    members: tuple[int, ...]
    prefix: int


Grouping = Callable[[Sequence[Features]], list[Group]]


@dataclass(frozen=True)
class TokenPlacement:
    """Position of a sample in a sequence: its first `prefix` tokens start at `begin`, the others at `suffix`."""

    sequence: int
    begin: int
    prefix: int
    suffix: int

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions in the sequence of the sample's tokens: ``[n] int64`` token indices -> ``[n] int64``."""
        return tokens + torch.where(tokens < self.prefix, self.begin, self.suffix - self.prefix)


def separate_groups(features: Sequence[Features]) -> list[Group]:
    """One group per sample."""
    return [Group((index,), len(feature.input_ids)) for index, feature in enumerate(features)]


def groups_by_frames(features: Sequence[Features]) -> list[Group]:
    """One group per frame set: samples with the same frame files in the same order share their common prefix.

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
    """Length of the longest common prefix of prompts, without the last token of any prompt."""
    first, *others = features
    if not others:
        return len(first.input_ids)
    # The last token of a prompt predicts the first token of the answer. It stays in the suffix, also if the prompts
    # are equal, so that the positions of every answer are those of one sample.
    count = min(len(feature.input_ids) - feature.num_answer_tokens for feature in features) - 1
    for feature in others:
        differs = (feature.input_ids[:count] != first.input_ids[:count]).nonzero()
        count = int(differs[0]) if len(differs) else count
    for feature in features:
        if feature.token_types[count:].any():  # visual tokens in the suffix
            raise ValueError(
                f"Sample {feature.sample.id}: its prompt differs from others about the same frames before the last "
                "frame; use the chat template that came with the model, or give data.questions_per_scene 1."
            )
    return count


def packed_layout(groups: Sequence[Group], features: Sequence[Features]) -> tuple[Layout, list[TokenPlacement]]:
    """Layout of one sequence ``[1, length]`` with all groups one after the other, and every sample's placement."""
    placements: dict[int, TokenPlacement] = {}
    spans: list[tuple[int, ...]] = []
    end = 0
    for group in groups:
        begin, ends = end, [end, end + group.prefix]
        end += group.prefix
        for member in group.members:
            placements[member] = TokenPlacement(0, begin, group.prefix, end)
            end += len(features[member].input_ids) - group.prefix
            ends.append(end)
        # A single sample is all prefix; the end of its empty suffix is dropped.
        spans.append(tuple(ends if len(group.members) > 1 else ends[:2]))
    # Lengths of the prefix and of each suffix, per group: repeat the index of the group (and of the prefix, 0, or the
    # suffix, 1, 2, ..., in the group) for each of its tokens.
    lengths = [torch.tensor(each).diff() for each in spans]
    group_index = torch.repeat_interleave(torch.tensor([int(each.sum()) for each in lengths]))
    suffix_index = torch.cat([torch.repeat_interleave(each) for each in lengths])
    layout = Layout(group_index[None], suffix_index[None], (tuple(spans),))
    return layout, [placements[index] for index in range(len(features))]


def padded_layout(features: Sequence[Features], attention_mask: torch.Tensor) -> tuple[Layout, list[TokenPlacement]]:
    """Layout of one sequence per sample, padded on the right; `attention_mask`: ``[batch, length]`` int64."""
    lengths = [len(feature.input_ids) for feature in features]
    # Every sequence has one group, 0, without suffixes; padding is -1.
    layout = Layout(attention_mask - 1, torch.zeros_like(attention_mask), tuple(((0, length),) for length in lengths))
    return layout, [TokenPlacement(index, 0, length, length) for index, length in enumerate(lengths)]


def pack_tokens(groups: Sequence[Group], tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pack a ``[tokens]`` tensor of every sample (ids or types) into ``[length]``, in the order of `packed_layout`."""
    parts = []
    for group in groups:
        first, *others = group.members
        parts += [tokens[first], *(tokens[member][group.prefix :] for member in others)]
    return torch.cat(parts)


def pack_position_ids(groups: Sequence[Group], firsts: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Multimodal position ids of one packed sequence.

    Args:
        groups: groups whose prefixes contain all frames.
        firsts: ``[3, groups, longest]`` int64, position ids of every group's first member, padded on the right.
        lengths: number of tokens of every sample.

    Returns:
        ``[3, 1, length]`` int64.
    """
    parts = []
    for index, group in enumerate(groups):
        first, *others = group.members
        parts.append(firsts[:, index, : lengths[first]])
        for member in others:
            # A suffix is text: its positions count up by one from the first token after the prefix, in all three
            # components. The first member's position there is the same for all members.
            count = torch.arange(lengths[member] - group.prefix)
            parts.append(firsts[:, index, group.prefix, None] + count)
    return torch.cat(parts, dim=1)[:, None]
