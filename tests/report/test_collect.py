"""Reading runs for a report."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from diagnosis_files import write_diagnoses
from report_runs import SET
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.report.collect import group_evaluations, read_run, run_names, title_of
from w2r2_ds.report.diagnosis.cues import cue_parts


def test_a_run(finished_run: Path, report_root: Path) -> None:
    run = read_run(finished_run, "margin")
    assert run.config.objective.push_term["name"] == "margin" and "push_term" in run.config_text
    assert [step for step, _ in run.metrics] == list(range(1, 61))
    (group,) = run.groups
    assert (group.task, group.data) == ("scanrefer", (str(report_root / SET),))
    assert sorted(group.by_geometry) == ["fused", "zero"]
    records = group.by_geometry["fused"].records()
    assert len(records) == group.by_geometry["fused"].samples > 0
    assert all(record["task"] == "scanrefer" for record in records.values())


def test_results_of_another_folder(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "evaluation", tmp_path / "a" / "b")
    (tmp_path / "diagnosis-scanrefer.json").write_text('{"table1": {"rows": [], "cells": []}}')
    run = read_run(finished_run, "margin", [tmp_path])
    (group,) = run.groups
    assert group.by_geometry["zero"].file.parent == tmp_path / "a" / "b" and len(run.diagnoses) == 1


def test_diagnoses_of_two_checkpoints_are_told_apart(finished_run: Path, tmp_path: Path) -> None:
    for name, data in (("evaluation", "val"), ("step_20", "val"), ("camera", "val_camera")):
        write_diagnoses(tmp_path / name, data=data)
    run = read_run(finished_run, "margin", [tmp_path])
    names = [f"val ({tmp_path.name}/{name})" for name in ("evaluation", "step_20")]
    assert [title_of(each) for each in run.diagnoses] == [f"scanrefer: {name}" for name in ("val_camera", *names)]
    assert [title_of(each) for _, each in run.features] == [title_of(each) for each in run.diagnoses]
    (table,) = cue_parts(run.diagnoses)[0].tables
    assert [name for name, _ in table.rows] == ["val_camera", *names]


def test_the_newer_of_two_evaluations_is_kept(finished_run: Path, tmp_path: Path) -> None:
    source = finished_run / "evaluation" / "scores-scanrefer-fused.json"
    files = [tmp_path / name / source.name for name in ("a", "b")]
    for file, age in zip(files, (100, 200), strict=True):
        file.parent.mkdir()
        shutil.copy(source, file)
        os.utime(file, (age, age))
    for order in (files, files[::-1]):
        (group,) = group_evaluations(order)
        assert group.by_geometry["fused"].file == files[1]


@pytest.mark.parametrize("field", ["weights", "data", "max_new_tokens"])
def test_answers_of_other_weights_data_or_options_are_not_compared(
    finished_run: Path, tmp_path: Path, field: str
) -> None:
    """As of a run and one of its checkpoints, or of a set that was prepared again under the same path."""
    for geometry in ("fused", "zero"):
        name = f"scores-scanrefer-{geometry}.json"
        scores = json.loads((finished_run / "evaluation" / name).read_text())
        scores["run"][field] = "other" if geometry == "zero" else scores["run"][field]
        (tmp_path / name).write_text(json.dumps(scores))
    groups = group_evaluations(sorted(tmp_path.iterdir()))
    assert sorted(list(group.by_geometry) for group in groups) == [["fused"], ["zero"]]
    assert field == "data" or len({group.title for group in groups}) == 2


def test_scores_of_saved_answers_are_skipped(
    finished_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished_run / "evaluation", tmp_path / "a")
    predictions = tmp_path / "a" / "predictions-scanrefer-fused.jsonl"
    score_file(predictions, out=tmp_path / "b")
    (group,) = read_run(finished_run, "margin", [tmp_path]).groups
    assert sorted(group.by_geometry) == ["fused", "zero"] and group.by_geometry["fused"].file.parent.name == "a"
    assert "b/scores-scanrefer-fused.json" in caplog.text and "score_only" in caplog.text


def test_errors_name_the_file(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_run(tmp_path, "x")
    with pytest.raises(ValueError, match="nowhere"):
        read_run(finished_run, "x", [tmp_path / "nowhere"])
    file = tmp_path / "scores-x-fused.json"
    file.write_text(json.dumps({"task": "scanrefer"}))
    with pytest.raises(ValueError, match=str(file)):
        read_run(finished_run, "x", [tmp_path])


def test_names_of_runs_are_short_and_different() -> None:
    assert run_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert run_names([Path("/r/a/seed-0"), Path("/r/b/seed-0")]) == ["a/seed-0", "b/seed-0"]
    with pytest.raises(ValueError, match="--run"):
        run_names([Path("/r/a"), Path("/r/a")])
