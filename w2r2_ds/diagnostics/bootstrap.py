"""Confidence intervals of scores by a bootstrap over scenes.

Questions about one scene share its frames and its geometry, so their errors are correlated. Samples are therefore not
resampled one by one, but scene by scene: every resample draws as many scenes as there are, with replacement, and keeps
all samples of each. Intervals are percentiles of the resampled scores (scipy.stats.bootstrap).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_SCENES = 5
"""Fewest scenes of an interval: with fewer, the resamples are too few different sets of scenes."""


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two scores, with its interval.

    Attributes:
        value: score of all samples; None if it is not defined.
        low: lower end of the interval; None without one.
        high: upper end of the interval; None without one.
        reason: why there is no value or no interval; empty if there is one.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Ratio:
    """A score sum(numerators) / sum(denominators) over samples; a mean has denominators of 1.

    Attributes:
        numerators: ``[samples]`` float64.
        denominators: ``[samples]`` float64.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @property
    def value(self) -> float:
        """The score of all samples."""
        return float(self.numerators.sum() / self.denominators.sum())


class SceneBootstrap:
    """Intervals of scores of one set of samples.

    All calls draw the same scenes, so that intervals are reproducible.

    Args:
        scenes: scene of every sample.
        resamples: number of resamples.
        seed: seed of the draws.
        confidence: coverage of the intervals.
    """

    def __init__(self, scenes: Sequence[str], resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> None:
        names, self.index = np.unique(np.asarray(scenes, dtype=str), return_inverse=True)
        self.scenes, self.resamples, self.seed, self.confidence = len(names), resamples, seed, confidence

    def score(self, ratio: Ratio) -> Estimate:
        """A score with its interval."""
        return self.function_of_sums(_score_difference, ratio.numerators, ratio.denominators)

    def difference(self, first: Ratio, second: Ratio) -> Estimate:
        """``first - second`` with the interval of the paired difference: both scores of the same drawn scenes."""
        parts = first.numerators, first.denominators, second.numerators, second.denominators
        return self.function_of_sums(_score_difference, *parts)

    def function_of_sums(self, function: Callable[..., np.ndarray], *values: np.ndarray) -> Estimate:
        """A function of sums over samples, with its interval.

        Args:
            function: (sums, each ``[..., scenes]``; axis) -> value; it sums over the scenes first.
            values: ``[samples]`` float64 each.
        """
        sums = [self._scene_sums(part) for part in values]
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # an undefined resample is handled below
            value = float(function(*sums, axis=-1))
            if not np.isfinite(value):
                return Estimate(None, reason="not defined: nothing to divide by")
            if self.scenes < MIN_SCENES:
                return Estimate(value, reason=f"{self.scenes} scenes; an interval needs at least {MIN_SCENES}")
            found = stats.bootstrap(
                sums,
                function,
                n_resamples=self.resamples,
                paired=True,  # the same scenes of all sums
                vectorized=True,
                method="percentile",
                confidence_level=self.confidence,
                random_state=np.random.default_rng(self.seed),
            ).confidence_interval
        if not (np.isfinite(found.low) and np.isfinite(found.high)):
            return Estimate(value, reason="not defined in some resamples: nothing to divide by")
        return Estimate(value, float(found.low), float(found.high))

    def _scene_sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of the values of every scene's samples, ``[scenes]``."""
        return np.bincount(self.index, weights=values, minlength=self.scenes)


def _score_difference(*sums: np.ndarray, axis: int) -> np.ndarray:
    """The score of (numerators, denominators) per scene, or the first score minus the second of two such pairs."""
    first, *second = (sums[i].sum(axis=axis) / sums[i + 1].sum(axis=axis) for i in range(0, len(sums), 2))
    result: np.ndarray = first - second[0] if second else first
    return result
