"""Statistics of paired comparisons: t interval over seeds, bootstrap over scenes and seeds, Holm's correction."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 0
_CHUNK = 1_000
"""Bootstrap samples that are drawn at a time, which bounds the memory."""


@dataclass(frozen=True)
class Comparison:
    """A mean difference with its uncertainty.

    Attributes:
        mean: mean difference.
        low, high: ends of the interval.
        p: two-sided p-value of the hypothesis that the difference is zero.
        method: ``t`` (over seeds) or ``bootstrap`` (over scenes and seeds).
        seeds: number of seeds that both arms have.
        scenes: number of scenes; 0 for ``t``.
        samples: number of samples per seed; 0 for ``t``.
    """

    mean: float
    low: float
    high: float
    p: float
    method: str
    seeds: int
    scenes: int = 0
    samples: int = 0


def paired_t(differences: Sequence[float], level: float = 0.95) -> Comparison | None:
    """Student's t interval and test of paired differences, one per seed; None for fewer than two seeds.

    If all differences are equal, the interval has no width; p is 1 if they are zero, else 0.

    Args:
        differences: metric of an arm minus that of the baseline, per seed.
        level: coverage of the interval.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    mean = float(values.mean())
    error = float(stats.sem(values))
    if error == 0.0:
        return Comparison(mean, mean, mean, float(mean == 0.0), "t", len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    return Comparison(mean, mean - half, mean + half, p, "t", len(values))


def paired_bootstrap(
    differences: np.ndarray,
    scenes: Sequence[Hashable],
    level: float = 0.95,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> Comparison:
    """Percentile bootstrap of the mean difference, which draws whole scenes and whole seeds with replacement.

    Questions about one scene share its frames, and answers of one training run share its weights, so neither are
    independent. Both are crossed: every seed answers the same questions (two-way pigeonhole bootstrap; Owen 2007, The
    Annals of Applied Statistics 1). With one seed, only scenes are drawn. p is twice the smaller share of bootstrap
    means on one side of zero, with one added to numerator and denominator, and at most 1.

    Args:
        differences: ``[seeds, samples]`` float64, score of an arm minus that of the baseline.
        scenes: scene of each sample.
        level: coverage of the interval.
        samples: number of bootstrap samples.
        seed: seed of the random numbers.
    """
    names, scene = np.unique(np.asarray(scenes, dtype=str), return_inverse=True)
    seeds, count = differences.shape
    assert len(scene) == count > 0
    sizes = np.bincount(scene)  # [scenes] samples per scene
    sums = np.stack([np.bincount(scene, weights=row) for row in differences])  # [seeds, scenes]
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _CHUNK):
        drawn = min(_CHUNK, samples - start)
        # How often each seed and each scene is drawn. A drawn scene brings all its samples, so their number varies.
        seed_draws = generator.multinomial(seeds, np.full(seeds, 1 / seeds), drawn)  # [drawn, seeds]
        scene_draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), drawn)  # [drawn, scenes]
        totals = ((seed_draws @ sums) * scene_draws).sum(1)
        means.append(totals / (seeds * (scene_draws @ sizes)))
    found = np.concatenate(means)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    # Sums of many terms: a mean that is zero may be 1e-17.
    smaller = min((found <= 1e-12).sum(), (found >= -1e-12).sum())
    p = min(1.0, 2 * (float(smaller) + 1) / (samples + 1))
    return Comparison(float(differences.mean()), float(low), float(high), p, "bootstrap", seeds, len(names), count)


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
