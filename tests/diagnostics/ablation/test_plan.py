"""Runs of an ablation: folders, finished parts, comparable settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ablation_runs import FUSED, STEPS, finish_run, make_plan, write_checkpoint, write_scores
from w2r2_ds.diagnostics.ablation.plan import check_identity, evaluation_folder

GRID = {"objective.lambda_det": [0, 1.5]}


def test_runs_are_ordered_by_seed_and_have_folders_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID], [4, 2])
    assert [(run.arm.name, run.seed) for run in plan.runs] == [
        ("lambda_det=0", 4),
        ("lambda_det=1.5", 4),
        ("lambda_det=0", 2),
        ("lambda_det=1.5", 2),
    ]
    assert plan.runs[1].folder == tmp_path / "runs" / "lambda_det=1.5" / "seed-4"


def test_a_run_is_finished_with_its_last_checkpoint_and_newer_scores(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID], evaluations={**FUSED, "zero": {"geometry": "zero"}})
    run = plan.runs[0]
    assert plan.needs_training(run) and plan.missing_evaluations(run) == ["fused", "zero"]
    write_checkpoint(run.folder, STEPS - 1)
    assert plan.needs_training(run)
    checkpoint = write_checkpoint(run.folder)
    assert not plan.needs_training(run) and plan.missing_evaluations(run) == ["fused", "zero"]
    for name in plan.evaluations:
        write_scores(evaluation_folder(run, name), [True])
    assert plan.is_finished(run) and not plan.is_finished(plan.runs[1])
    score = evaluation_folder(run, "fused") / "scores-scanrefer-fused.json"
    before = (checkpoint / "checkpoint.json").stat().st_mtime - 10
    os.utime(score, (before, before))
    assert plan.missing_evaluations(run) == ["fused"]


def test_words_of_a_run(tmp_path: Path) -> None:
    evaluations = {"camera": {"task": "scanrefer", "data": "prepared/camera", "limit": 5}}
    plan = make_plan(tmp_path, [GRID], [3], evaluations=evaluations, plugins=["extra.py"])
    run = plan.runs[1]
    assert plan.words_of_training(run) == [
        "--plugin=extra.py",
        "--config=recipe.yaml",
        "--objective.lambda_det=1.5",
        "--train.seed=3",
        f"--out={run.folder}",
    ]
    assert plan.words_of_evaluation(run, "camera") == [
        "--plugin=extra.py",
        f"--checkpoint={run.folder}",
        f"--out={run.folder}/evaluation/camera",
        "--task=scanrefer",
        "--data=prepared/camera",
        "--limit=5",
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"baseline": "lambda_det=7"}, "lambda_det=1.5"),
        ({"seeds": []}, "--seeds"),
        ({"seeds": [1, 1]}, "--seeds"),
        ({"seeds": [-1]}, "--seeds"),
        ({"evaluations": {"a/b": {}}}, "a/b"),
        ({"evaluations": {"..": {}}}, ".."),
    ],
)
def test_errors_name_the_option(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        make_plan(tmp_path, [GRID], **changes)
    assert named in str(error.value)


def test_runs_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    shared = {"train.steps": 5, "data.val": [{"path": "a"}], "plugins": []}
    check_identity(tmp_path, shared, FUSED)
    check_identity(tmp_path, shared, FUSED)
    with pytest.raises(ValueError, match=r"train\.steps was 5 and is 6"):
        check_identity(tmp_path, {**shared, "train.steps": 6}, FUSED)
    with pytest.raises(ValueError, match=r"data\.val"):
        check_identity(tmp_path, {"train.steps": 5, "plugins": []}, FUSED)


def test_evaluations_can_be_added_but_not_changed(tmp_path: Path) -> None:
    check_identity(tmp_path, {}, FUSED)
    check_identity(tmp_path, {}, {"zero": {"geometry": "zero"}})
    with pytest.raises(ValueError, match="evaluation fused"):
        check_identity(tmp_path, {}, {"fused": {"geometry": "shuffle"}})
    with pytest.raises(ValueError, match="evaluation zero"):
        check_identity(tmp_path, {}, {"zero": {"geometry": "zero", "limit": 3}})


def test_a_finished_run_has_no_missing_evaluation(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID])
    finish_run(plan.runs[0], [True, False])
    assert plan.is_finished(plan.runs[0])
