"""Questions about the same frames are in one batch, every sample once per epoch, for any sizes of the sets."""

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
"""How many samples see each set of frames."""


def scenes(counts: list[int]) -> Mixture:
    """Samples of which so many see the same frames, in an order that mixes them; and as many text samples as one."""
    frames = [(Path(f"{number}.jpg"),) for number, count in enumerate(counts) for _ in range(count)]
    mixed = np.random.default_rng(0).permutation(len(frames))
    return Mixture([[SimpleNamespace(frames=frames[i]) for i in mixed]], [1.0], [0])  # type: ignore[list-item]


def sampler(mixture: Mixture, together: int, rank: int = 0, world: int = 1, **changes: Any) -> GlobalBatchSampler:
    """Global batches of 24 samples."""
    options = {"micro_batch": 24 // world, "steps": 4 * len(mixture) // 24 + 2} | changes
    return GlobalBatchSampler(mixture, 24, rank=rank, world_size=world, seed=3, questions_per_scene=together, **options)


def stream(each: GlobalBatchSampler) -> list[int]:
    return [index for batch in each for index in batch]


@settings(max_examples=30)
@given(SETS, st.sampled_from([2, 3, 4, 8]))
def test_every_sample_once_per_epoch_in_scene_groups_that_share_frames(counts: list[int], together: int) -> None:
    mixture = scenes(counts)
    size, sets = len(mixture), mixture.frame_sets()
    found = stream(sampler(mixture, together))
    for epoch in range(3):
        assert sorted(found[epoch * size : (epoch + 1) * size]) == list(range(size))
    for epoch in range(3):
        begin, end = (-(-each * size // together) for each in (epoch, epoch + 1))
        groups = [found[number * together : (number + 1) * together] for number in range(begin, end - 1)]
        whole = sum(len(set(sets[each])) == 1 for each in groups)
        # At most one full bin is split to fill the short ones at the ends.
        assert whole >= sum(count // together for count in counts) - 1
        # All of a set that comes in one bin comes at once.
        assert all(len(set(sets[each])) == 1 + np.count_nonzero(np.diff(sets[each])) for each in groups)


@settings(max_examples=30)
@given(SETS, st.sampled_from([2, 4]), st.integers(0, 5))
def test_the_same_for_every_split_and_after_a_resume(counts: list[int], together: int, start: int) -> None:
    mixture = scenes(counts)
    whole = stream(sampler(mixture, together))
    steps = len(whole) // 24
    for world, micro in [(1, 8), (2, 12), (3, 4), (6, 4)]:
        ranks = [list(sampler(mixture, together, rank, world, micro_batch=micro)) for rank in range(world)]
        assert [index for batches in zip(*ranks, strict=True) for each in batches for index in each] == whole
    begin = min(start, steps - 1)
    assert stream(sampler(mixture, together, start=begin)) == whole[24 * begin :]


def test_rests_are_combined_whole_where_they_fit() -> None:
    """Three and one, two and two; not three and a half of a pair."""
    sets = np.repeat([0, 1, 2, 3, 4], [3, 1, 2, 2, 4])
    for seed in range(20):
        order = group_by_frames(np.arange(12), sets, 4, 0, np.random.default_rng(seed))
        kinds = {tuple(sorted(Counter(sets[order[begin : begin + 4]]).values())) for begin in (0, 4, 8)}
        assert kinds == {(1, 3), (2, 2), (4,)}


def test_epochs_and_seeds_have_other_scene_groups() -> None:
    mixture = scenes([7, 9, 6, 2])
    found = stream(sampler(mixture, 4))
    epochs = {tuple(found[begin : begin + 24]) for begin in range(0, 96, 24)}
    assert len(epochs) == 4
    partners = {frozenset(each[:4]) for each in epochs}
    assert len(partners) == 4


def test_one_question_per_scene_leaves_the_order_alone() -> None:
    mixture = scenes([7, 9, 6, 2])
    assert stream(sampler(mixture, 1)) == [int(i) for epoch in range(6) for i in mixture.epoch(3, epoch)][: 24 * 6]


def test_a_micro_batch_is_made_of_whole_scene_groups() -> None:
    with pytest.raises(AssertionError):
        sampler(scenes([8]), 4, micro_batch=2)
