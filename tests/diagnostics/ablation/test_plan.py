"""Runs of an ablation: folders, finished parts, comparable settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ablation_runs import FUSED, STEPS, finish_run, make_plan, write_checkpoint, write_scores
from w2r2_ds.commands.evaluate import evaluations_of
from w2r2_ds.diagnostics.ablation.plan import evaluation_folder, read_score_file

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


def test_a_run_is_finished_with_its_last_checkpoint_and_scores_of_its_weights(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID], evaluations={**FUSED, "zero": {"geometry": "zero"}})
    run = plan.runs[0]
    assert plan.needs_training(run) and plan.missing_evaluations(run) == ["fused", "zero"]
    write_checkpoint(run.folder, STEPS - 1)
    assert plan.needs_training(run)
    write_checkpoint(run.folder)
    assert not plan.needs_training(run) and plan.missing_evaluations(run) == ["fused", "zero"]
    for name in plan.evaluations:
        write_scores(evaluation_folder(run, name), [True])
    assert plan.is_finished(run) and not plan.is_finished(plan.runs[1])
    write_scores(evaluation_folder(run, "fused"), [True], weights="of another checkpoint")
    assert plan.missing_evaluations(run) == ["fused"]


def test_scores_without_weights_are_not_those_of_a_run(tmp_path: Path) -> None:
    """As of `w2r2 evaluate --score_only`; the file of the evaluation beside it counts."""
    plan = make_plan(tmp_path, [GRID])
    run = plan.runs[0]
    write_checkpoint(run.folder)
    folder = evaluation_folder(run, "fused")
    folder.mkdir(parents=True)
    (folder / "scores-theirs.json").write_text('{"protocols": {}, "samples": 3}')
    assert plan.missing_evaluations(run) == ["fused"]
    write_scores(folder, [True])
    found = read_score_file(run, "fused")
    assert found is not None and found[0].name == "scores-scanrefer-fused.json" and plan.is_finished(run)
    (folder / "scores-copy.json").write_text(found[0].read_text())
    with pytest.raises(ValueError, match=r"scores-copy\.json"):
        read_score_file(run, "fused")


def test_words_of_a_run(tmp_path: Path) -> None:
    evaluations = {"camera": {"task": "scanrefer", "data": "prepared/camera", "limit": 5}, **FUSED}
    plan = make_plan(tmp_path, [GRID], [3], evaluations=evaluations, plugins=["extra.py"])
    run = plan.runs[1]
    assert plan.words_of_training(run) == [
        "--plugin=extra.py",
        "--config=recipe.yaml",
        "--objective.lambda_det=1.5",
        "--train.seed=3",
        f"--out={run.folder}",
    ]
    *words, options, reuse = plan.words_of_evaluations(run, ["camera"])
    assert words == ["--plugin=extra.py", f"--checkpoint={run.folder}", f"--out={run.folder}/evaluation"]
    assert options.startswith("--evaluations=") and reuse == "--reuse=true"
    assert evaluations_of(options.partition("=")[2]) == {"camera": evaluations["camera"]}


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


def test_a_finished_run_has_no_missing_evaluation(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID])
    finish_run(plan.runs[0], [True, False])
    assert plan.is_finished(plan.runs[0])
