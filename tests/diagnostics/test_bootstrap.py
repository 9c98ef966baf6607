"""Intervals over scenes: against scenes drawn by hand, correlated samples, few scenes, paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from w2r2_ds.diagnostics.bootstrap import MIN_SCENES, Ratio, SceneBootstrap


def mean_of(values: np.ndarray) -> Ratio:
    return Ratio(values.astype(np.float64), np.ones(len(values)))


def names(scenes: int, per_scene: int) -> list[str]:
    return [f"scene{number:04d}_00" for number in range(scenes) for _ in range(per_scene)]


def test_the_interval_is_that_of_resampled_scenes() -> None:
    """A direct loop over drawn scenes, with all samples of each, gives the same percentiles within their noise."""
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.4
    scenes = names(12, 5)
    found = SceneBootstrap(scenes, 4000, 1).score(mean_of(hits))
    draws = []
    for _ in range(4000):
        chosen = rng.integers(0, 12, 12)
        draws.append(np.concatenate([hits[5 * scene : 5 * scene + 5] for scene in chosen]).mean())
    assert found.value == hits.mean()
    assert found.low == pytest.approx(np.percentile(draws, 2.5), abs=0.02)
    assert found.high == pytest.approx(np.percentile(draws, 97.5), abs=0.02)


def test_equal_samples_of_a_scene_count_once() -> None:
    """Ten copies of every sample change nothing, while single samples would give an interval of a third."""
    hits = np.random.default_rng(1).random(20) < 0.5
    one = SceneBootstrap(names(20, 1)).score(mean_of(hits))
    ten = SceneBootstrap(names(20, 10)).score(mean_of(np.repeat(hits, 10)))
    alone = SceneBootstrap(names(200, 1)).score(mean_of(np.repeat(hits, 10)))
    assert one == ten
    assert None not in (ten.low, ten.high, alone.low, alone.high)
    assert ten.high - ten.low > 2 * (alone.high - alone.low)  # type: ignore[operator]


def test_a_ratio_divides_the_sums_of_the_drawn_scenes() -> None:
    """Scenes with other denominators: the score is no mean of the scenes' scores."""
    numerators, denominators = np.array([9.0, 1, 1, 1, 1]), np.array([90.0, 1, 1, 1, 1])
    found = SceneBootstrap(names(5, 1), 1000).score(Ratio(numerators, denominators))
    assert found.value == pytest.approx(13 / 94)
    assert found.low == pytest.approx(0.1, abs=0.02) and found.high == 1.0


def test_a_paired_difference_has_the_same_scenes_on_both_sides() -> None:
    """Rows that differ by 0.1 in every scene: the difference is certain, though both scores are not."""
    scores = np.random.default_rng(2).random(30)
    bootstrap = SceneBootstrap(names(10, 3))
    found = bootstrap.difference(mean_of(scores + 0.1), mean_of(scores))
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    single = bootstrap.score(mean_of(scores))
    assert single.high - single.low > 0.05  # type: ignore[operator]


def test_the_seed_decides() -> None:
    hits = mean_of(np.random.default_rng(3).random(40) < 0.5)
    first, again, other = (SceneBootstrap(names(40, 1), 200, seed).score(hits) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("scenes", [1, MIN_SCENES - 1])
def test_few_scenes_have_no_interval(scenes: int) -> None:
    found = SceneBootstrap(names(scenes, 7)).score(mean_of(np.arange(7 * scenes) % 2))
    assert (found.low, found.high) == (None, None)
    assert str(scenes) in found.reason and found.value > 0
    assert SceneBootstrap(names(MIN_SCENES, 7)).score(mean_of(np.arange(7 * MIN_SCENES) % 2)).reason == ""


def test_resamples_without_anything_to_count_have_no_interval() -> None:
    """One scene of six has objects: a resample without it is 0 / 0."""
    found = SceneBootstrap(names(6, 1)).score(Ratio(np.array([1.0, 0, 0, 0, 0, 0]), np.array([2.0, 0, 0, 0, 0, 0])))
    assert (found.value, found.low) == (0.5, None) and found.reason
