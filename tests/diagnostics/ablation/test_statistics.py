"""Statistics of ablations against scipy, hand-computed values and exact enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from w2r2_ds.diagnostics.ablation.statistics import holm, paired_bootstrap, paired_t


def test_paired_t_equals_scipy() -> None:
    generator = np.random.default_rng(3)
    arm, base = generator.normal(0.3, 1, 6), generator.normal(size=6)
    found = paired_t(list(arm - base), 0.9)
    expected = stats.ttest_rel(arm, base)
    interval = expected.confidence_interval(0.9)
    assert found is not None and (found.method, found.seeds) == ("t", 6)
    # Both are float64 with the same formula.
    np.testing.assert_allclose([found.p, found.low, found.high], [expected.pvalue, interval.low, interval.high], 1e-12)
    assert found.mean == pytest.approx((arm - base).mean(), rel=1e-12)


def test_paired_t_by_hand() -> None:
    """Differences 1, 2, 4: mean 7/3, variance 7/3, error sqrt(7)/3; t(0.975, 2) = 4.302653."""
    found = paired_t([1, 2, 4])
    assert found is not None
    assert found.high - found.mean == pytest.approx(4.302652729911275 * np.sqrt(7) / 3, rel=1e-9)
    # Survival of t with two degrees of freedom at x: 1/2 - x / (2 sqrt(2 + x^2)); x = (7/3) / (sqrt(7)/3) = sqrt(7).
    assert found.p == pytest.approx(1 - np.sqrt(7) / 3, rel=1e-9)


def test_paired_t_of_few_or_equal_differences() -> None:
    assert paired_t([0.5]) is None and paired_t([]) is None
    zero, half = paired_t([0.0, 0.0, 0.0]), paired_t([0.5, 0.5])
    assert zero is not None and (zero.low, zero.high, zero.p) == (0.0, 0.0, 1.0)
    assert half is not None and (half.low, half.high, half.p) == (0.5, 0.5, 0.0)


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


def test_bootstrap_of_one_seed_and_one_sample_per_scene_equals_scipy() -> None:
    values = np.random.default_rng(5).normal(0.2, 1, 40)
    found = paired_bootstrap(values[None], list(range(40)), samples=20_000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # A quantile of 20,000 draws has a standard error of about 0.02 deviations of the mean, here 0.16 * 0.02 = 0.003.
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=0.015)
    assert (found.scenes, found.samples, found.seeds, found.method) == (40, 40, 1, "bootstrap")


def test_bootstrap_by_enumeration() -> None:
    """All draws of two seeds and three scenes of different sizes, with their probabilities."""
    differences = np.array([[1.0, 0, 0, -1, 1, 1], [0, 1, 0, 0, -1, 1]])
    scenes = ["a", "a", "a", "b", "b", "c"]
    members = {name: [i for i, scene in enumerate(scenes) if scene == name] for name in "abc"}
    means = []
    for seeds in itertools.product((0, 1), repeat=2):
        for drawn in itertools.product("abc", repeat=3):
            samples = [i for name in drawn for i in members[name]]
            means.append(differences[np.ix_(seeds, samples)].mean())
    found = paired_bootstrap(differences, scenes, samples=40_000)
    exact = np.array(means)
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert found.low == pytest.approx(low, abs=1e-12) and found.high == pytest.approx(high, abs=1e-12)
    p = 2 * min((exact <= 1e-12).mean(), (exact >= -1e-12).mean())
    # Standard error of a share of 40,000 draws: at most 0.0025, twice that for p.
    assert found.p == pytest.approx(p, abs=0.02)
    assert found.mean == pytest.approx(differences.mean())


def test_questions_about_one_scene_are_not_independent() -> None:
    """Equal questions in groups of ten: the interval is as wide as for one question per scene."""
    scene_values = np.random.default_rng(0).normal(size=12)
    single = paired_bootstrap(scene_values[None], list(range(12)))
    repeated = paired_bootstrap(np.repeat(scene_values, 10)[None], np.repeat(np.arange(12), 10).tolist())
    independent = paired_bootstrap(np.repeat(scene_values, 10)[None], list(range(120)))
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert independent.high - independent.low < 0.5 * (repeated.high - repeated.low)


def test_seeds_that_disagree_widen_the_interval() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 60)
    agree = paired_bootstrap(np.stack([values, values]), list(range(60)))
    disagree = paired_bootstrap(np.stack([values - 1, values + 1]), list(range(60)))
    assert agree.mean == pytest.approx(disagree.mean)
    assert agree.p < 0.001 and disagree.p > 0.2
    assert disagree.high - disagree.low > 10 * (agree.high - agree.low)


def test_no_difference_has_p_1() -> None:
    found = paired_bootstrap(np.zeros((3, 8)), list("aabbccdd"))
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)
