"""Compare every arm of an ablation with the baseline arm, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.ablation.results import RunScores, Score
from w2r2_ds.diagnostics.ablation.statistics import (
    NONE,
    Comparison,
    holm,
    over_seeds,
    over_seeds_and_scenes,
    untested,
)


@dataclass(frozen=True)
class Row:
    """One arm and metric.

    Attributes:
        arm: name of the arm.
        metric: ``EVALUATION PROTOCOL METRIC``.
        by_seed: seed -> value.
        difference: arm minus baseline; None for the baseline itself, and if no seed is common.
        over_seeds: the same difference on these samples, tested over seeds only; None if it cannot be.
        p_holm: p of `difference`, adjusted for all comparisons of the table that have one.
    """

    arm: str
    metric: str
    by_seed: Mapping[int, float]
    difference: Comparison | None = None
    over_seeds: Comparison | None = None
    p_holm: float | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for one seed."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """All values, for results.json."""
        values = list(self.by_seed.values())
        spread = {"mean": self.mean, "deviation": self.deviation, "min": min(values), "max": max(values)}
        return {**spread, **asdict(self), "by_seed": {str(seed): value for seed, value in self.by_seed.items()}}


def compare(results: Mapping[str, Mapping[int, RunScores]], baseline: str, level: float = 0.95) -> list[Row]:
    """Rows of all arms and metrics, by metric, with p adjusted for all comparisons (Holm).

    Only seeds that both arms have are compared. The difference is tested over seeds and scenes if the metric has scores
    per sample and there are enough scenes, else over seeds. One seed is not tested.

    Args:
        results: arm -> seed -> scores, in the order of the table.
        baseline: name of the baseline arm.
        level: coverage of the intervals, before any correction.
    """
    metrics = dict.fromkeys(metric for seeds in results.values() for scores in seeds.values() for metric in scores)
    rows = []
    for metric in metrics:
        values = {
            arm: {seed: scores[metric] for seed, scores in seeds.items() if metric in scores}
            for arm, seeds in results.items()
        }
        for arm, by_seed in values.items():
            if by_seed:
                rows.append(_row(arm, metric, by_seed, {} if arm == baseline else values[baseline], level))
    tested = [(id(row), row.difference.p) for row in rows if row.difference and row.difference.p is not None]
    adjusted = holm([p for _, p in tested])
    corrected = {row: p for (row, _), p in zip(tested, adjusted, strict=True)}
    return [
        Row(row.arm, row.metric, row.by_seed, row.difference, row.over_seeds, corrected.get(id(row))) for row in rows
    ]


def _row(arm: str, metric: str, scores: Mapping[int, Score], base: Mapping[int, Score], level: float) -> Row:
    by_seed = {seed: score.value for seed, score in sorted(scores.items())}
    common = [seed for seed in by_seed if seed in base]
    if not common:
        return Row(arm, metric, by_seed)
    values = [scores[seed].value - base[seed].value for seed in common]
    seeds_only = over_seeds(values, level)
    paired = _paired_samples(metric, [(scores[seed], base[seed]) for seed in common])
    if paired is None:
        difference = seeds_only or Comparison(float(np.mean(values)), None, None, None, NONE, len(values))
    else:
        difference = over_seeds_and_scenes(*paired, level) or seeds_only or untested(*paired, level)
    return Row(arm, metric, by_seed, difference, seeds_only)


def _paired_samples(metric: str, pairs: Sequence[tuple[Score, Score]]) -> tuple[np.ndarray, Sequence[str]] | None:
    """Differences per sample, ``[seeds, samples]``, and the scene of each; None if a run has no scores per sample.

    Raises:
        ValueError: two runs were evaluated on different samples.
    """
    scored = [score.samples for pair in pairs for score in pair]
    known = [samples for samples in scored if samples is not None]
    if len(known) < len(scored):
        return None
    if len({samples.ids for samples in known}) > 1:
        raise ValueError(f"{metric}: the runs were evaluated on different samples; evaluate them on the same set.")
    # known: arm and baseline of the first seed, of the second, ...
    differences = np.stack([arm.values - base.values for arm, base in zip(known[::2], known[1::2], strict=True)])
    return differences, known[0].scenes
