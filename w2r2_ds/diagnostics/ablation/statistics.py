"""Statistics of paired comparisons: t tests over seeds, and over seeds and scenes; Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from w2r2_ds.diagnostics.bootstrap import MIN_SCENES, Ratio, SceneBootstrap

SEEDS, SEEDS_AND_SCENES = "t over seeds", "t over seeds and scenes"
SCENES, NONE = "bootstrap over scenes", "none"


@dataclass(frozen=True)
class Comparison:
    """A mean difference with its uncertainty.

    Attributes:
        mean: mean difference.
        low, high: ends of the interval; None without one.
        p: two-sided p-value of the hypothesis that the difference is zero; None without a test.
        method: `SEEDS_AND_SCENES`, `SEEDS`, `SCENES` (an interval of a single seed, without a test) or `NONE`.
        seeds: number of seeds that both arms have.
        scenes: number of scenes; 0 if they are not used.
        samples: number of samples per seed; 0 if they are not used.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    seeds: int
    scenes: int = 0
    samples: int = 0


def over_seeds(differences: Sequence[float], level: float = 0.95) -> Comparison | None:
    """Student's t interval and test of paired differences, one per seed.

    The result holds for other trainings, on the same samples.

    Args:
        differences: metric of an arm minus that of the baseline, per seed.
        level: coverage of the interval.

    Returns:
        None for fewer than two seeds, and if all differences are equal but not zero: their spread is unknown then.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    ends = _t_test(float(values.mean()), [(float(stats.sem(values)), len(values) - 1)], level)
    return None if ends is None else Comparison(float(values.mean()), *ends, SEEDS, len(values))


def over_seeds_and_scenes(differences: np.ndarray, scenes: Sequence[str], level: float = 0.95) -> Comparison | None:
    """t interval and test of the mean difference, which hold for other trainings and for other scenes.

    Answers of one training share its weights, questions about one scene share its frames, and every seed answers the
    same questions: both are random, and crossed. The squared standard error is the sum of those over seeds and over
    scenes, and Satterthwaite's formula gives its degrees of freedom. This is min F' of Clark (1973, Journal of Verbal
    Learning and Verbal Behavior 12), as a t test. A true null hypothesis is rejected at the nominal rate if one of the
    two errors is much larger than the other, else less often: the variation of single answers is in both errors.

    Args:
        differences: ``[seeds, samples]`` float64, score of an arm minus that of the baseline.
        scenes: scene of each sample.
        level: coverage of the interval.

    Returns:
        None for fewer than two seeds or ``MIN_SCENES`` scenes, and if both errors are zero but the difference is not.
    """
    seeds, count = differences.shape
    _, scene, sizes = np.unique(np.asarray(scenes, dtype=str), return_inverse=True, return_counts=True)
    number = len(sizes)
    assert len(scene) == count > 0
    if seeds < 2 or number < MIN_SCENES:
        return None
    mean = float(differences.mean())
    # Error over scenes of a ratio: sum of a scene's deviations, whose number of samples varies.
    deviations = np.bincount(scene, weights=differences.mean(axis=0)) - mean * sizes
    scene_error = float(np.sqrt(number / (number - 1) * (deviations**2).sum())) / count
    errors = [(float(stats.sem(differences.mean(axis=1))), seeds - 1), (scene_error, number - 1)]
    ends = _t_test(mean, errors, level)
    return None if ends is None else Comparison(mean, *ends, SEEDS_AND_SCENES, seeds, number, count)


def untested(differences: np.ndarray, scenes: Sequence[str], level: float = 0.95) -> Comparison:
    """The mean difference with a bootstrap interval over scenes if there are enough; it has no p.

    Args:
        differences: ``[seeds, samples]`` float64, score of an arm minus that of the baseline.
        scenes: scene of each sample.
        level: coverage of the interval.
    """
    seeds, count = differences.shape
    bootstrap = SceneBootstrap(scenes, confidence=level)
    found = bootstrap.score(Ratio(differences.mean(axis=0), np.ones(count)))
    method = NONE if found.low is None else SCENES
    return Comparison(float(differences.mean()), found.low, found.high, None, method, seeds, bootstrap.scenes, count)


def _t_test(mean: float, errors: Sequence[tuple[float, int]], level: float) -> tuple[float, float, float] | None:
    """Ends of the interval, and p, of a mean whose squared standard errors add up.

    Args:
        mean: the estimate.
        errors: standard error and degrees of freedom of each source of variation.
        level: coverage of the interval.

    Returns:
        None if all errors are zero and the mean is not; the interval of a mean and errors of zero has no width.
    """
    variance = sum(error**2 for error, _ in errors)
    if variance < 1e-24 * max(1.0, mean**2):  # equal differences, up to the rounding of float64
        return (0.0, 0.0, 1.0) if abs(mean) < 1e-12 else None
    freedom = variance**2 / sum(error**4 / degrees for error, degrees in errors)
    error = variance**0.5
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for several comparisons (Holm 1979, Scandinavian Journal of Statistics 6), in their order.

    The k-th smallest of n p-values (k from 1) is multiplied by ``n - k + 1``; an adjusted p-value is at least that of
    every smaller one, and at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(value) for value in adjusted]
