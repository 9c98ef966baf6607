"""Tables of a report: scores with intervals over scenes, and Table 1 of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.ablation.results import SampleScores, sample_scores
from w2r2_ds.diagnostics.bootstrap import MIN_SCENES, Ratio, SceneBootstrap
from w2r2_ds.evaluation.scoring import headline
from w2r2_ds.report.collect import Evaluation, EvaluationGroup, title_of

GEOMETRY_NAMES = {"fused": "2D + 3D", "zero": "2D only", "shuffle": "shuffled geometry"}
"""Geometry of an evaluation -> label, in the order of the columns."""


@dataclass(frozen=True)
class Cell:
    """A score in percent, as text.

    Attributes:
        value: the score; empty if it is unknown.
        interval: its interval; empty without one.
    """

    value: str
    interval: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """A table with a column per set of answers.

    Attributes:
        title: task and data.
        columns: names of the columns.
        rows: name and cells of each row.
        note: how the intervals were made, and other remarks.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str


def score_table(group: EvaluationGroup) -> ScoreTable:
    """Scores of all geometries of a group, and the difference of fused and 2D only."""
    shown = {name: group.by_geometry[name] for name in GEOMETRY_NAMES if name in group.by_geometry}
    values = {name: headline(evaluation.protocols) for name, evaluation in shown.items()}
    samples = {name: _sample_scores(evaluation) for name, evaluation in shown.items()}
    metrics = list(dict.fromkeys(metric for each in values.values() for metric in each))
    # Both are of the first samples of the same data, so equal numbers are equal samples.
    both = {"fused", "zero"} <= set(shown)
    has_difference = both and shown["fused"].samples == shown["zero"].samples
    rows = []
    for metric in metrics:
        cells = [score_cell(values[name].get(metric), samples[name].get(metric)) for name in shown]
        if has_difference:
            pair = [(values[name].get(metric), samples[name].get(metric)) for name in ("fused", "zero")]
            cells.append(difference_cell(*pair))
        rows.append((metric, cells))
    columns = [GEOMETRY_NAMES[name] for name in shown] + (["2D + 3D minus 2D only"] if has_difference else [])
    counts = {f"{evaluation.samples} of {evaluation.of} samples" for evaluation in shown.values()}
    note = (
        f"Times 100; {', '.join(sorted(counts))}. Brackets: 95 % bootstrap interval over scenes, of metrics that are "
    )
    note += f"means over samples, with at least {MIN_SCENES} scenes."
    if both and not has_difference:
        note += " No difference: the two columns are of different samples."
    return ScoreTable(group.title, columns, rows, note)


def _sample_scores(evaluation: Evaluation) -> dict[str, SampleScores]:
    """``PROTOCOL METRIC`` -> scores per sample of the metrics that have some."""
    if not evaluation.predictions.is_file():
        return {}
    found = {}
    for protocol, result in evaluation.protocols.items():
        prefix = f"{protocol} "
        values = {
            name.removeprefix(prefix): value
            for name, value in headline({protocol: result}).items()
            if value is not None
        }
        for metric, scores in sample_scores(evaluation.file, protocol, values).items():
            found[prefix + metric] = scores
    return found


def score_cell(value: float | None, samples: SampleScores | None) -> Cell:
    """A score with its interval."""
    if value is None:
        return Cell("")
    return Cell(f"{100 * value:.1f}", "" if samples is None else _interval(samples.values, samples.scenes))


def difference_cell(
    left: tuple[float | None, SampleScores | None], right: tuple[float | None, SampleScores | None]
) -> Cell:
    """The difference of two scores of the same samples, with the interval of the paired difference.

    Raises:
        ValueError: the scores are of different samples.
    """
    if left[0] is None or right[0] is None:
        return Cell("")
    interval = ""
    if left[1] is not None and right[1] is not None:
        if left[1].ids != right[1].ids:
            raise ValueError("the two scores are of different samples; evaluate them on the same set.")
        interval = _interval(left[1].values - right[1].values, left[1].scenes, signed=True)
    return Cell(f"{100 * (left[0] - right[0]):+.1f}", interval)


def _interval(values: np.ndarray, scenes: Sequence[str], signed: bool = False) -> str:
    found = SceneBootstrap(scenes).score(Ratio(values, np.ones(len(values))))
    if found.low is None or found.high is None:
        return ""
    sign = "+" if signed else ""
    return f"[{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


def diagnosis_tables(diagnosis: Mapping[str, Any]) -> list[ScoreTable]:
    """Table 1 of a diagnosis: one table per protocol and group, with a column per set of answers.

    Args:
        diagnosis: content of a file of ``w2r2 diagnose``; other parts than ``table1`` are ignored.
    """
    table = diagnosis.get("table1")
    if not isinstance(table, Mapping):
        return []
    rows, cells = table["rows"], table["cells"]
    tables = []
    for protocol, group in dict.fromkeys((cell["protocol"], cell["group"]) for cell in cells):
        own = {(c["row"], c["metric"]): c for c in cells if (c["protocol"], c["group"]) == (protocol, group)}
        metrics = dict.fromkeys(metric for _, metric in own)
        lines = [(metric, [_diagnosed(own.get((row["row"], metric))) for row in rows]) for metric in metrics]
        first = next(iter(own.values()))
        note = (
            f"Times 100; {first['samples']} samples of {first['scenes']} scenes, 95 % bootstrap intervals over scenes."
        )
        tables.append(
            ScoreTable(f"{title_of(diagnosis)}: {protocol}, {group}", [row["label"] for row in rows], lines, note)
        )
    return tables


def _diagnosed(cell: Mapping[str, Any] | None) -> Cell:
    if cell is None or cell["value"] is None or not math.isfinite(cell["value"]):
        return Cell("")
    interval = "" if cell["low"] is None else f"[{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return Cell(f"{100 * cell['value']:.1f}", interval)
