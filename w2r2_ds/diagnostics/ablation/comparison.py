"""Compare every arm of an ablation with the baseline arm, metric by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.ablation.results import RunScores, Score
from w2r2_ds.diagnostics.ablation.statistics import Comparison, holm, paired_bootstrap, paired_t


@dataclass(frozen=True)
class Row:
    """One arm and metric.

    Attributes:
        arm: name of the arm.
        metric: ``EVALUATION PROTOCOL METRIC``.
        by_seed: seed -> value.
        difference: arm minus baseline; None for the baseline itself, and if nothing can be compared.
        over_seeds: t interval of the same difference; None for fewer than two seeds.
        p_holm: p of `difference`, adjusted for all comparisons of the table; None without one.
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

    Only seeds that both arms have are compared. The difference is bootstrapped over scenes and seeds if the metric has
    scores per sample, else it is Student's t over seeds.

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
    compared = [row for row in rows if row.difference is not None]
    adjusted = holm([row.difference.p for row in compared if row.difference is not None])
    corrected = {id(row): p for row, p in zip(compared, adjusted, strict=True)}
    return [
        Row(row.arm, row.metric, row.by_seed, row.difference, row.over_seeds, corrected.get(id(row))) for row in rows
    ]


def _row(arm: str, metric: str, scores: Mapping[int, Score], base: Mapping[int, Score], level: float) -> Row:
    by_seed = {seed: score.value for seed, score in sorted(scores.items())}
    common = [seed for seed in by_seed if seed in base]
    if not common:
        return Row(arm, metric, by_seed)
    over_seeds = paired_t([scores[seed].value - base[seed].value for seed in common], level)
    pairs = [(scores[seed], base[seed]) for seed in common]
    return Row(arm, metric, by_seed, _bootstrap(metric, pairs, level) or over_seeds, over_seeds)


def _bootstrap(metric: str, pairs: Sequence[tuple[Score, Score]], level: float) -> Comparison | None:
    """Bootstrap of the differences per sample; None if a run has no scores per sample.

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
    return paired_bootstrap(differences, known[0].scenes, level)
