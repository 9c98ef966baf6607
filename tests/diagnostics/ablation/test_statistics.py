"""Statistics of ablations against scipy, hand-computed values and simulated ablations without a difference."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from w2r2_ds.diagnostics.ablation.statistics import (
    NONE,
    SCENES,
    SEEDS,
    SEEDS_AND_SCENES,
    holm,
    over_seeds,
    over_seeds_and_scenes,
    untested,
)
from w2r2_ds.diagnostics.bootstrap import Ratio, SceneBootstrap


def test_t_over_seeds_equals_scipy() -> None:
    generator = np.random.default_rng(3)
    arm, base = generator.normal(0.3, 1, 6), generator.normal(size=6)
    found = over_seeds(list(arm - base), 0.9)
    expected = stats.ttest_rel(arm, base)
    interval = expected.confidence_interval(0.9)
    assert found is not None and (found.method, found.seeds) == (SEEDS, 6)
    # Both are float64 with the same formula.
    np.testing.assert_allclose([found.p, found.low, found.high], [expected.pvalue, interval.low, interval.high], 1e-12)
    assert found.mean == pytest.approx((arm - base).mean(), rel=1e-12)


def test_t_over_seeds_by_hand() -> None:
    """Differences 1, 2, 4: mean 7/3, variance 7/3, error sqrt(7)/3; t(0.975, 2) = 4.302653."""
    found = over_seeds([1, 2, 4])
    assert found is not None and found.high is not None
    assert found.high - found.mean == pytest.approx(4.302652729911275 * np.sqrt(7) / 3, rel=1e-9)
    # Survival of t with two degrees of freedom at x: 1/2 - x / (2 sqrt(2 + x^2)); x = (7/3) / (sqrt(7)/3) = sqrt(7).
    assert found.p == pytest.approx(1 - np.sqrt(7) / 3, rel=1e-9)


def test_t_of_few_differences() -> None:
    assert over_seeds([0.5]) is None and over_seeds([]) is None


def test_holm_by_hand() -> None:
    """n = 4: .005 x 4, .01 x 3, .03 x 2, .04 x 1; the last is raised to its predecessor. As R's p.adjust."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_holm_rejects_at_most_as_much_as_without_correction() -> None:
    generator = np.random.default_rng(0)
    p_values = list(generator.uniform(0, 0.2, 20))
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    ordered = [adjusted[i] for i in np.argsort(p_values)]
    assert ordered == sorted(ordered) and ordered[0] == min(1.0, 20 * min(p_values))


def test_the_error_over_seeds_and_scenes_by_hand() -> None:
    """Two seeds with means 2 and 4; five scenes with means 1 to 5, the first of two samples (weights 2, 1, 1, 1, 1)."""
    scene_values = np.array([2, 2, 3, 4, 5, 2.0])
    scenes = ["a", "a", "b", "c", "d", "e"]
    differences = np.stack([scene_values - 1, scene_values + 1])
    found = over_seeds_and_scenes(differences, scenes)
    assert found is not None
    mean = 3.0
    # Seeds: means 2 and 4, standard deviation sqrt(2), error 1. Scenes: sums of deviations -2, 0, 1, 2, -1.
    seed_error, scene_error = 1.0, np.sqrt(5 / 4 * (4 + 0 + 1 + 4 + 1)) / 6
    variance = seed_error**2 + scene_error**2
    freedom = variance**2 / (seed_error**4 / 1 + scene_error**4 / 4)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    expected = [mean - half, mean + half, 2 * stats.t.sf(mean / np.sqrt(variance), freedom)]
    # The same formula in float64.
    np.testing.assert_allclose([found.low, found.high, found.p], expected, rtol=1e-12)
    assert (found.mean, found.method, found.seeds, found.scenes, found.samples) == (3.0, SEEDS_AND_SCENES, 2, 5, 6)


def test_trainings_without_spread_leave_a_t_test_over_scenes() -> None:
    values = np.random.default_rng(5).normal(0.2, 1, 40)
    found = over_seeds_and_scenes(np.stack([values, values, values]), list(map(str, range(40))), 0.9)
    expected = stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.9)
    assert found is not None
    np.testing.assert_allclose([found.p, found.low, found.high], [expected.pvalue, interval.low, interval.high], 1e-9)


NULLS = {"trainings": (0.05, 0.0, 0.2), "scenes": (0.0, 0.3, 0.2), "both": (0.03, 0.1, 0.2), "answers": (0, 0, 1)}
"""Standard deviations of the differences of trainings, scenes and single answers, without a difference of the arms."""


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("source", NULLS)
def test_equal_arms_are_rejected_at_the_nominal_rate(seeds: int, source: str) -> None:
    """Of 300 simulated ablations without a difference, p < 0.05 in 5 % where one source of variation is largest."""
    generator = np.random.default_rng(seeds)
    training, scene, answer = NULLS[source]
    scenes = [str(index // 3) for index in range(60)]
    rejected = 0
    for _ in range(300):
        differences = training * generator.normal(size=(seeds, 1)) + answer * generator.normal(size=(seeds, 60)) / 10
        differences += scene * np.repeat(generator.normal(size=20), 3)
        found = over_seeds_and_scenes(differences, scenes)
        assert found is not None and found.p is not None
        rejected += found.p < 0.05
    # A count outside has a probability below 0.001 if the rate is 5 %.
    low, high = stats.binom.ppf([0.0005, 0.9995], 300, 0.05)
    assert rejected <= high
    assert rejected >= low or source in ("both", "answers")  # two errors of one size: rejected less often


def test_scenes_that_differ_are_not_taken_for_a_difference_of_the_arms() -> None:
    """A test over seeds alone has p < 0.001 for the same differences."""
    values = np.random.default_rng(1).normal(0, 1, 20)
    differences = values + 0.001 * np.random.default_rng(2).normal(size=(5, 1))
    both = over_seeds_and_scenes(differences, list(map(str, range(20))))
    alone = over_seeds(differences.mean(axis=1).tolist())
    assert both is not None and alone is not None and both.p is not None and alone.p is not None
    assert alone.p < 0.001 and both.p > 0.05


def test_questions_about_one_scene_are_not_independent() -> None:
    """Equal questions in groups of ten: the interval is that of one question per scene."""
    values = np.random.default_rng(0).normal(size=(3, 12))
    single = over_seeds_and_scenes(values, list(map(str, range(12))))
    repeated = over_seeds_and_scenes(np.repeat(values, 10, axis=1), [str(index // 10) for index in range(120)])
    assert single is not None and repeated is not None
    assert (repeated.low, repeated.high, repeated.p) == pytest.approx((single.low, single.high, single.p), rel=1e-9)


def test_few_seeds_or_scenes_have_no_test() -> None:
    values = np.random.default_rng(0).normal(size=(3, 8))
    scenes = list("abcdefgh")
    assert over_seeds_and_scenes(values[:1], scenes) is None
    assert over_seeds_and_scenes(values, list("aabbccdd")) is None  # fewer than MIN_SCENES
    one, few = untested(values[:1], scenes), untested(values[:1], list("aabbccdd"))
    interval = SceneBootstrap(scenes).score(Ratio(values[0], np.ones(8)))
    assert (one.method, one.low, one.high, one.p) == (SCENES, interval.low, interval.high, None)
    assert (few.method, few.low, few.p, few.mean, few.scenes) == (NONE, None, None, one.mean, 4)


def test_equal_differences_have_no_test_unless_they_are_zero() -> None:
    """Two trainings may differ from the baseline by the same number of answers by chance: their spread is unknown."""
    zero, half = over_seeds([0.0, 0.0, 0.0]), over_seeds([0.1 + 0.2, 0.3])
    assert zero is not None and (zero.low, zero.high, zero.p) == (0.0, 0.0, 1.0)
    assert half is None
    none = over_seeds_and_scenes(np.zeros((3, 8)), list("abcdefgh"))
    assert none is not None and (none.low, none.high, none.p) == (0.0, 0.0, 1.0)
    assert over_seeds_and_scenes(np.ones((3, 8)), list("abcdefgh")) is None
