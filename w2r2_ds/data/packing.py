"""Where the tokens of samples are in the sequences of a batch: each in its own, or all of a micro-batch in one.

Frames come before the question, so that samples that see the same frames begin with the same tokens, which a causal
model answers alike. Packed, such a group has them once, a prefix, and then a suffix for every sample: the rest of its
question, and its answer. Positions of a suffix go on from the prefix, as if the others were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from w2r2_ds.data.processor import Features
from w2r2_ds.types.batch import Layout


@dataclass(frozen=True)
class Group:
    """Samples that share frames.

    Attributes:
        members: their places in the micro-batch.
        prefix: how many tokens they share; all of them, where there is one member.
    """

    members: tuple[int, ...]
    prefix: int


Grouping = Callable[[Sequence[Features]], list[Group]]


@dataclass(frozen=True)
class TokenPlacement:
    """Where a sample's tokens are: the first `prefix` of them from `begin` on, the others from `suffix` on."""

    sequence: int
    begin: int
    prefix: int
    suffix: int

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions in the sequence of these tokens, int64, of the sample."""
        return tokens + torch.where(tokens < self.prefix, self.begin, self.suffix - self.prefix)


def alone(features: Sequence[Features]) -> list[Group]:
    """Nothing is shared."""
    return [Group((index,), len(each.input_ids)) for index, each in enumerate(features)]


def by_frames(features: Sequence[Features]) -> list[Group]:
    """Samples that see the same files in the same order share all tokens up to the first that differs.

    Raises:
        ValueError: a prompt has frames after its question.
    """
    members: dict[object, list[int]] = {}
    for index, each in enumerate(features):
        members.setdefault(each.sample.frames, []).append(index)
    return [Group(tuple(found), _shared([features[index] for index in found])) for found in members.values()]


def _shared(features: Sequence[Features]) -> int:
    """Tokens with which all begin; at least the last of every prompt, which predicts its answer, is left out."""
    first, *others = features
    if not others:
        return len(first.input_ids)
    count = min(len(each.input_ids) - each.answer_tokens for each in features) - 1
    for each in others:
        differs = (each.input_ids[:count] != first.input_ids[:count]).nonzero()
        count = int(differs[0]) if len(differs) else count
    for each in features:
        if each.token_types[count:].any():
            raise ValueError(
                f"Sample {each.sample.id}: its prompt differs from others about the same frames before the last frame; "
                "use the chat template that came with the model, or give data.questions_per_scene 1."
            )
    return count


def in_one_sequence(groups: Sequence[Group], features: Sequence[Features]) -> tuple[Layout, list[TokenPlacement]]:
    """The layout of all groups, one after the other; and the place of every sample."""
    places: dict[int, TokenPlacement] = {}
    spans: list[tuple[int, ...]] = []
    end = 0
    for group in groups:
        begin, ends = end, [end, end + group.prefix]
        end += group.prefix
        for member in group.members:
            places[member] = TokenPlacement(0, begin, group.prefix, end)
            end += len(features[member].input_ids) - group.prefix
            ends.append(end)
        spans.append(tuple(ends if len(group.members) > 1 else ends[:2]))
    lengths = [torch.tensor(each).diff() for each in spans]
    group_of = torch.repeat_interleave(torch.tensor([int(each.sum()) for each in lengths]))
    suffix_of = torch.cat([torch.repeat_interleave(each) for each in lengths])
    layout = Layout(group_of[None], suffix_of[None], (tuple(spans),))
    return layout, [places[index] for index in range(len(features))]


def one_by_one(features: Sequence[Features], attention_mask: torch.Tensor) -> tuple[Layout, list[TokenPlacement]]:
    """Every sample is a sequence and a group of its own, padded on the right."""
    lengths = [len(each.input_ids) for each in features]
    layout = Layout(attention_mask - 1, torch.zeros_like(attention_mask), tuple(((0, length),) for length in lengths))
    return layout, [TokenPlacement(index, 0, length, length) for index, length in enumerate(lengths)]


def joined(groups: Sequence[Group], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[length]``: what every sample's tokens have, ``[tokens]`` each, as `in_one_sequence` places them."""
    parts = []
    for group in groups:
        first, *others = group.members
        parts += [rows[first], *(rows[member][group.prefix :] for member in others)]
    return torch.cat(parts)


def joined_positions(groups: Sequence[Group], firsts: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Multimodal positions of one packed sequence.

    Args:
        groups: whose prefixes hold all frames, so that a suffix is text, which counts on.
        firsts: ``[3, groups, longest]`` int64 positions of the first member of every group, padded on the right.
        lengths: tokens of every sample.

    Returns:
        ``[3, 1, length]`` int64.
    """
    parts = []
    for index, group in enumerate(groups):
        first, *others = group.members
        parts.append(firsts[:, index, : lengths[first]])
        for member in others:
            count = torch.arange(lengths[member] - group.prefix)
            parts.append(firsts[:, index, group.prefix, None] + count)
    return torch.cat(parts, dim=1)[:, None]
