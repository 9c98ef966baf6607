"""Scene groups of the sampler: questions about the same frames in one batch, each sample once per epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler, group_by_frames

SETS = st.lists(st.integers(1, 12), min_size=1, max_size=12)
"""Number of samples of each frame set."""


def scenes(counts: list[int]) -> Mixture:
    """`counts` samples of each frame set, shuffled."""
    frames = [(Path(f"{number}.jpg"),) for number, count in enumerate(counts) for _ in range(count)]
    mixed = np.random.default_rng(0).permutation(len(frames))
    return Mixture([[SimpleNamespace(frames=frames[i]) for i in mixed]], [1.0], [0])  # type: ignore[list-item]


def sampler(mixture: Mixture, group_size: int, rank: int = 0, world: int = 1, **changes: Any) -> GlobalBatchSampler:
    """Global batches of 24 samples."""
    options = {"micro_batch": 24 // world, "steps": 4 * len(mixture) // 24 + 2} | changes
    return GlobalBatchSampler(
        mixture, 24, rank=rank, world_size=world, seed=3, questions_per_scene=group_size, **options
    )


def stream(batches: GlobalBatchSampler) -> list[int]:
    return [index for batch in batches for index in batch]


@settings(max_examples=30)
@given(SETS, st.sampled_from([2, 3, 4, 8]))
def test_each_epoch_has_every_sample_once_in_scene_groups(counts: list[int], group_size: int) -> None:
    mixture = scenes(counts)
    size, sets = len(mixture), mixture.frame_sets()
    found = stream(sampler(mixture, group_size))
    for epoch in range(3):
        assert sorted(found[epoch * size : (epoch + 1) * size]) == list(range(size))
    for epoch in range(3):
        begin, end = (-(-each * size // group_size) for each in (epoch, epoch + 1))
        groups = [found[number * group_size : (number + 1) * group_size] for number in range(begin, end - 1)]
        single_set = sum(len(set(sets[each])) == 1 for each in groups)
        # At most one full group is split, to fill the incomplete ones at the ends of the epoch.
        assert single_set >= sum(count // group_size for count in counts) - 1
        # Samples of a frame set are consecutive in a group.
        assert all(len(set(sets[each])) == 1 + np.count_nonzero(np.diff(sets[each])) for each in groups)


@settings(max_examples=30)
@given(SETS, st.sampled_from([2, 4]), st.integers(0, 5))
def test_same_order_for_any_number_of_ranks_and_after_a_resume(counts: list[int], group_size: int, start: int) -> None:
    mixture = scenes(counts)
    expected = stream(sampler(mixture, group_size))
    steps = len(expected) // 24
    for world, micro in [(1, 8), (2, 12), (3, 4), (6, 4)]:
        ranks = [list(sampler(mixture, group_size, rank, world, micro_batch=micro)) for rank in range(world)]
        assert [index for batches in zip(*ranks, strict=True) for each in batches for index in each] == expected
    begin = min(start, steps - 1)
    assert stream(sampler(mixture, group_size, start=begin)) == expected[24 * begin :]


def test_remainders_are_combined_without_splitting() -> None:
    """Remainders of 3 and 1, and of 2 and 2, make groups of 4; no pair is split."""
    sets = np.repeat([0, 1, 2, 3, 4], [3, 1, 2, 2, 4])
    for seed in range(20):
        order = group_by_frames(np.arange(12), sets, 4, 0, np.random.default_rng(seed))
        kinds = {tuple(sorted(Counter(sets[order[begin : begin + 4]]).values())) for begin in (0, 4, 8)}
        assert kinds == {(1, 3), (2, 2), (4,)}


def test_epochs_have_different_scene_groups() -> None:
    mixture = scenes([7, 9, 6, 2])
    found = stream(sampler(mixture, 4))
    epochs = {tuple(found[begin : begin + 24]) for begin in range(0, 96, 24)}
    assert len(epochs) == 4
    partners = {frozenset(each[:4]) for each in epochs}
    assert len(partners) == 4


def test_one_question_per_scene_keeps_the_order_of_the_mixture() -> None:
    mixture = scenes([7, 9, 6, 2])
    assert stream(sampler(mixture, 1)) == [int(i) for epoch in range(6) for i in mixture.epoch(3, epoch)][: 24 * 6]


def test_a_micro_batch_is_made_of_whole_scene_groups() -> None:
    with pytest.raises(AssertionError):
        sampler(scenes([8]), 4, micro_batch=2)
