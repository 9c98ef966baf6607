"""w2r2 ablate: command lines, errors before the first run, exit codes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from ablation_runs import finish_run, make_plan
from fork_server import ROOT
from w2r2_ds.commands import ablate
from w2r2_ds.config.io import load_config
from w2r2_ds.data.prepared_set import VERSION
from w2r2_ds.diagnostics.ablation import runner
from w2r2_ds.diagnostics.ablation.plan import Run
from w2r2_ds.objective.push_terms import PUSH_TERMS
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED

DEMO = str(ROOT / "w2r2_ds" / "recipes" / "demo.yaml")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the ablation. The working directory is the repository root; the demo's data are not made."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate, "prepare", lambda *_: {})
    return tmp_path / "out"


def words(out: Path, *others: str) -> list[str]:
    return ["--out", str(out), "--config", DEMO, "--grid", "{objective.lambda_det: [0, 1.5]}", "--seeds", "2", *others]


def test_dry_run_prints_the_commands_and_writes_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        ablate.main(words(out, "--train.steps", "5", "--dry_run", "--evaluations", "{zero: {geometry: zero}}")) == DONE
    )
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["deepspeed", "python"] * 4
    first = lines[0]
    assert first[first.index("--train.steps") + 1] == "5" and f"--config={DEMO}" in first
    assert {"--objective.lambda_det=0", "--train.seed=0", "--demo.enabled=false", "--resume=auto"} <= set(first)
    assert '--evaluations={"zero": {"geometry": "zero"}}' in lines[1] and not out.exists()


def test_grids_of_a_file_and_a_preset_are_concatenated(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("objective.push_term: [none]\nobjective.visual_mask_ratio: [0.5]\n")
    options = ["--out", str(out), "--grid", str(file), "--preset", "push_terms", "--seeds", "[3]", "--dry_run"]
    assert ablate.main(options) == DONE
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("deepspeed")]
    assert len(trained) == 1 + len(PUSH_TERMS) and "--objective.visual_mask_ratio=0.5" in trained[0]
    assert all("--train.seed=3" in line for line in trained)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (["--train.stepz", "5"], "train.steps"),
        (["--train.seed", "5"], "--seeds"),
        (["--resume", "auto"], "--resume"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "[a]"], "--seeds"),
        (["--baseline", "mu=7"], "--baseline"),
        (["--preset", "nu"], "--preset"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--grid", "{objective.mu: [7]}"], "objective.mu"),
        (["--grid", "{objective.push_term: [margn]}"], "margn"),
        (["--grid", "{objective.push_term: [contrast]}", "--train.micro_batch", "1"], "train.micro_batch"),
        (["--evaluations", "{a: {geometry: both}}"], "geometry"),
        (["--evaluations", "{a: {geometri: zero}}"], "geometri"),
        (["--evaluations", "{a: {checkpoint: x}}"], "checkpoint"),
        (["--evaluations", "{a: {reuse: false}}"], "reuse"),
        (["--evaluations", "{a: {vlm: x}}"], "vlm"),
        (["--evaluations", "{a: {limit: .nan}}"], "limit"),
        (["--grid", "{objective.push_term: {name: none}}", "--preset", "push_terms"], "push_term=none"),
        (["--evaluations", "{a: 3}"], "--evaluations"),
        (["--dry_run", "--slurm"], "--slurm"),
    ],
)
def test_errors_name_the_option(out: Path, others: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(words(out, *others)) == FAILED
    error = capsys.readouterr().err
    assert named in error and error.startswith("w2r2 ablate: ") and not out.exists()


def test_no_grid(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(["--out", str(out), "--dry_run"]) == FAILED
    assert "--grid" in capsys.readouterr().err


def test_another_folder_has_no_launchers(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ablate.main(["--out", str(out), "--preset", "lambda"]) == FAILED
    assert "launchers/train.py" in capsys.readouterr().err


def test_failed_runs_are_listed_and_the_others_compared(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run fails in the first call; the second call repeats only this one."""
    started: list[str] = []
    broken = True

    def finish(self: Any, run: Run, devices: Any) -> runner.Failure | None:
        started.append(run.name)
        if broken and run.name == "lambda_det=1.5 seed 0":
            run.folder.mkdir(parents=True)
            (run.folder / "log.txt").write_text("out of memory\n")
            return runner.Failure(run, "train", 1, run.folder / "log.txt")
        finish_run(run, [True, run.arm.name == "lambda_det=1.5"])
        return None

    monkeypatch.setattr(runner.LocalRunner, "_finish", finish)
    options = words(out, "--evaluations", "{fused: {geometry: fused}}", "--train.steps", "2", "--jobs", "1")
    assert ablate.main(options) == FAILED
    printed = capsys.readouterr().out
    assert "lambda_det=1.5 seed 0: train ended with 1" in printed and "out of memory" in printed
    content = json.loads((out / "results.json").read_text())
    assert content["unfinished"] == ["lambda_det=1.5 seed 0"] and len(content["failures"]) == 1
    started.clear()
    broken = False
    assert ablate.main(options) == DONE
    assert started == ["lambda_det=1.5 seed 0"]
    content = json.loads((out / "results.json").read_text())
    assert content["unfinished"] == content["failures"] == []
    started.clear()
    assert ablate.main([*options, "--table_only", "--metrics", "acc@0.5"]) == DONE
    assert started == [] and "acc@0.5" in capsys.readouterr().out
    metrics = {name for arm in json.loads((out / "results.json").read_text())["arms"] for name in arm["metrics"]}
    assert metrics and all("acc@0.5" in name for name in metrics)


def test_other_settings_need_another_folder(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main(words(out, "--table_only", "--train.steps", "2")) == DONE
    assert ablate.main(words(out, "--table_only", "--train.steps", "3")) == FAILED
    assert "train.steps" in capsys.readouterr().err
    assert ablate.main(words(out, "--table_only", "--train.steps", "2", "--seeds", "5")) == DONE


def test_slurm_writes_the_commands_and_prints_the_sbatch_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    options = words(out, "--slurm", "--train.steps", "2", "--evaluations", "{fused: {geometry: fused}}")
    assert ablate.main([*options, "--ranks", "2"]) == DONE
    resources = ["--ntasks-per-node=2", "--gpus-per-node=2"]
    expected = ["sbatch", "--array=0-3", *resources, "slurm/ablate.sbatch", str(out)]
    assert capsys.readouterr().out.split() == expected
    assert len(list((out / "slurm").glob("task-*.txt"))) == 4
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert ablate.main(options) == DONE
    assert capsys.readouterr().out.split()[2:4] == ["--ntasks-per-node=1", "slurm/ablate.sbatch"]
    for run in make_plan(out, [{"objective.lambda_det": [0, 1.5]}], [0, 1]).runs:
        finish_run(run, [True])
    assert ablate.main(options) == DONE
    assert capsys.readouterr().out == ""  # nothing to submit


def test_an_evaluation_of_a_run_with_several_tasks_needs_a_task(tmp_path: Path) -> None:
    """Found before the first run. The sets have manifests only."""
    for name in ("scanrefer", "scanqa"):
        (tmp_path / name).mkdir()
        manifest = {"version": VERSION, "task": name, "counts": {"samples": 1}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    sets = "[{path: scanrefer}, {path: scanqa}]"
    base = load_config(DEMO, ["--demo.enabled", "false", "--data.root", str(tmp_path), "--data.val", sets])
    with pytest.raises(ValueError, match=r"--evaluations: fused: data\.val has scanrefer .* --task"):
        ablate.prepare(make_plan(tmp_path / "out", [{"objective.mu": [0.1]}]), base, [base])
    small = make_plan(tmp_path / "out", [{"objective.mu": [0.1]}], evaluations={"a": {"batch_size": 0}})
    with pytest.raises(ValueError, match="--evaluations: a: --batch_size"):
        ablate.prepare(small, base, [base])
