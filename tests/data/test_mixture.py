"""Weights, caps and epochs of a mixture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from w2r2_ds.data.mixture import Mixture


def mixture(weights: list[float], caps: list[int] | None = None) -> Mixture:
    """A mixture of data sets with 5, 0 and 4 items; an item is the set's name and an index."""
    sets = [[f"a{i}" for i in range(5)], [], [f"c{i}" for i in range(4)]]
    return Mixture(sets, weights, caps or [0, 0, 0])  # type: ignore[arg-type]


def test_items_are_those_of_the_sets_in_order() -> None:
    both = mixture([1, 1, 1])
    assert list(both) == ["a0", "a1", "a2", "a3", "a4", "c0", "c1", "c2", "c3"]
    assert both[-1] == "c3" and both[4:6] == ["a4", "c0"]
    for index in (9, -10):
        with pytest.raises(IndexError):
            both[index]


def test_an_epoch_follows_weights_and_caps() -> None:
    both = mixture([2.4, 1, 1.5], [0, 0, 5])
    assert both.samples_per_set == [12, 0, 5] and both.epoch_size == 17
    for epoch in range(3):
        counts = Counter(both[int(i)] for i in both.epoch(3, epoch))
        assert sorted(counts[f"a{i}"] for i in range(5)) == [2, 2, 2, 3, 3]  # 12 = 2 x 5 + 2
        assert sorted(counts[f"c{i}"] for i in range(4)) == [1, 1, 1, 2]  # 6, capped at 5


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    half = mixture([0.6, 1, 1])
    first = half.epoch(0, 0)
    np.testing.assert_array_equal(first, half.epoch(0, 0))
    drawn = {tuple(sorted(i for i in half.epoch(0, epoch) if i < 5)) for epoch in range(20)}
    assert {len(each) for each in drawn} == {3} and len(drawn) > 5
    assert not np.array_equal(first, half.epoch(1, 0))
