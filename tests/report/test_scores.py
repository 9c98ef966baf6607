"""Tables of a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from w2r2_ds.diagnostics.ablation.results import SampleScores
from w2r2_ds.diagnostics.bootstrap import Ratio, SceneBootstrap
from w2r2_ds.report.collect import read_run
from w2r2_ds.report.scores import MIN_SCENES, Cell, diagnosis_tables, difference_cell, score_cell, score_table

PROTOCOL = "scanrefer/vgllm-direct"


def scores(values: list[float], scenes: str) -> SampleScores:
    return SampleScores(tuple(map(str, range(len(values)))), tuple(scenes), np.array(values))


def test_scores_of_both_geometries_and_their_difference(finished_run: Path) -> None:
    run = read_run(finished_run, "margin")
    table = score_table(run.groups[0])
    assert table.columns == ["2D + 3D", "2D only", "2D + 3D minus 2D only"]
    rows = dict(table.rows)
    fused, zero, difference = rows[f"{PROTOCOL} acc@0.5"]
    results = {name: each.protocols[PROTOCOL] for name, each in run.groups[0].by_geometry.items()}
    expected = {name: 100 * result["overall"]["acc@0.5"] for name, result in results.items()}
    assert float(fused.value) == pytest.approx(expected["fused"], abs=0.05) and float(zero.value) < float(fused.value)
    assert float(difference.value) == pytest.approx(expected["fused"] - expected["zero"], abs=0.05)
    assert fused.interval == ""  # the set has two scenes


def test_intervals_are_bootstraps_over_scenes() -> None:
    left, right = scores([1, 0, 1, 1, 1, 0, 1], "aabcdef"), scores([0, 0, 1, 0, 1, 0, 0], "aabcdef")
    bootstrap, ones = SceneBootstrap(left.scenes), np.ones(7)
    found = bootstrap.difference(Ratio(left.values, ones), Ratio(right.values, ones))
    cell = difference_cell((5 / 7, left), (2 / 7, right))
    assert cell == Cell("+42.9", f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]")
    own = bootstrap.score(Ratio(left.values, ones))
    assert score_cell(5 / 7, left) == Cell("71.4", f"[{100 * own.low:.1f}, {100 * own.high:.1f}]")
    few = scores([1.0] * (MIN_SCENES - 1), "abcd")
    assert score_cell(1.0, few) == Cell("100.0") and score_cell(None, few) == Cell("")
    assert difference_cell((None, left), (0.5, right)) == Cell("")
    with pytest.raises(ValueError, match="different samples"):
        difference_cell((0.5, left), (0.5, few))


def test_scores_of_other_samples_have_no_difference(finished_run: Path) -> None:
    """As after evaluations with another --limit."""
    group = read_run(finished_run, "margin").groups[0]
    fewer = replace(group.by_geometry["zero"], samples=3)
    table = score_table(replace(group, by_geometry={**group.by_geometry, "zero": fewer}))
    assert table.columns == ["2D + 3D", "2D only"] and "different samples" in table.note


def test_table_1_of_a_diagnosis() -> None:
    cell = {"protocol": PROTOCOL, "group": "overall", "metric": "acc@0.25", "samples": 40, "scenes": 6}
    diagnosis = {
        "task": "scanrefer",
        "data": [{"path": "prepared/val"}],
        "table1": {
            "rows": [{"row": "fused", "label": "2D + 3D"}, {"row": "random", "label": "random guess"}],
            "cells": [
                {**cell, "row": "fused", "value": 0.605, "low": 0.5, "high": 0.7},
                {**cell, "row": "random", "value": 0.01, "low": None, "high": None},
            ],
        },
    }
    (table,) = diagnosis_tables(diagnosis)
    assert table.title == f"scanrefer: prepared/val: {PROTOCOL}, overall"
    assert table.columns == ["2D + 3D", "random guess"]
    assert table.rows == [("acc@0.25", [Cell("60.5", "[50.0, 70.0]"), Cell("1.0")])]
    assert diagnosis_tables({"other": 1}) == []
