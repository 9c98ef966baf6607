"""Shortcut cues: the share of answers that follow 2D appearance on shifted splits, beside the scores of all splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from w2r2_ds.diagnostics.table1 import OVERALL
from w2r2_ds.report.collect import title_of, with_label
from w2r2_ds.report.diagnosis.parts import Part, measure_cell
from w2r2_ds.report.scores import GEOMETRY_NAMES, ScoreTable

METRIC = "acc@0.25"
"""Score of the comparison of splits."""
SHARES = ("truth", "cue", "neither")


def cue_parts(diagnoses: Sequence[Mapping[str, Any]]) -> list[Part]:
    """A comparison of all splits, and the shares of every shifted one; empty without a shifted split.

    Args:
        diagnoses: contents of the files of ``w2r2 diagnose`` of one run.
    """
    shifted = [each for each in diagnoses if each.get("cues")]
    if not shifted:
        return []
    tasks = {each["task"] for each in shifted}
    compared = [each for each in diagnoses if each["task"] in tasks and each.get("table1")]
    return [Part("All splits", [_comparison(compared)]), *(Part(title_of(each), [_shares(each)]) for each in shifted)]


def _comparison(diagnoses: Sequence[Mapping[str, Any]]) -> ScoreTable:
    """A row per split: score and followed cues, with geometry and without."""
    rows = []
    for diagnosis in diagnoses:
        cues = diagnosis.get("cues") or {}
        scores = [measure_cell(_score(diagnosis, row), percent=True) for row in ("fused", "zero")]
        followed = [
            measure_cell(cues[row]["iou"]["cue"] if row in cues else None, percent=True) for row in ("fused", "zero")
        ]
        rows.append((_split(diagnosis), [*scores, *followed]))
    names = [GEOMETRY_NAMES[row] for row in ("fused", "zero")]
    columns = [f"{METRIC}, {name}" for name in names] + [f"cue followed, {name}" for name in names]
    note = "Percent, with 95 % intervals over scenes. A split without a shift has no cue."
    return ScoreTable("Scores and followed cues", columns, rows, note)


def _split(diagnosis: Mapping[str, Any]) -> str:
    """Short name of the data: the last part of each folder."""
    names = ", ".join(PurePath(str(each["path"])).name for each in diagnosis.get("data") or ())
    return with_label(names or str(diagnosis["task"]), diagnosis)


def _score(diagnosis: Mapping[str, Any], row: str) -> Mapping[str, Any] | None:
    """Score of a row of Table 1 on all samples, by the first protocol with `METRIC`."""
    cells = [cell for cell in diagnosis["table1"]["cells"] if (cell["row"], cell["group"]) == (row, OVERALL)]
    return next((cell for cell in cells if cell["metric"] == METRIC), None)


def _shares(diagnosis: Mapping[str, Any]) -> ScoreTable:
    """Shares of every row, by IoU and by the distance of the centres."""
    labels = {row["row"]: row["label"] for row in diagnosis["table1"]["rows"]}
    rows, scored = [], set()
    for row, measures in diagnosis["cues"].items():
        used = [measures[name] for name in ("iou", "centre")]
        scored |= {str(each["scored"]) for each in used[:1]}
        rows.append(
            (labels.get(row, row), [measure_cell(each[share], percent=True) for each in used for share in SHARES])
        )
    columns = [f"{share} ({name})" for name in ("IoU", "centre") for share in SHARES]
    note = f"Percent of the answers whose truth and cue can be told apart ({', '.join(sorted(scored))} by IoU)."
    return ScoreTable("Answers that agree with the truth, with the 2D cue, or with neither", columns, rows, note)
