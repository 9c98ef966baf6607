"""The demo: it starts nothing for a wrong command line, trains on a free port, and reuses what exists."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ablation_runs import write_checkpoint
from runs import ROOT
from w2r2_ds.commands import demo
from w2r2_ds.config.io import load_config
from w2r2_ds.demo import run


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--steps", 1)])
def test_help_and_a_wrong_option_start_no_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, status: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo started")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("sys.argv", ["demo.py", argument])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "launchers" / "demo.py"), run_name="__main__")
    assert stopped.value.code == status
    printed = capsys.readouterr()
    assert "runs/demo" in printed.out if status == 0 else "--steps" in printed.err


def test_training_uses_a_free_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another run may use the launcher's default port 29500."""
    ports = []

    def command(*words: str) -> None:
        if words[0] == "deepspeed":
            ports.append(int(words[words.index("--master_port") + 1]))
            sys.exit("stop here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_command", command)
    monkeypatch.setattr(run, "free_port", iter([41234, 41235]).__next__)
    for _ in range(2):
        with pytest.raises(SystemExit, match="stop here"):
            run.run_demo()
    assert ports == [41234, 41235]


def test_finished_steps_are_reused_and_the_report_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a checkpoint, scores and an adapter, only the scenes and the report are commands."""
    config = load_config(overrides=["--out", str(tmp_path / "train")])
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "load_config", lambda overrides: config)
    monkeypatch.setattr(run, "run_command", lambda *words: commands.append(words))
    monkeypatch.setattr(run, "print_results", lambda *_: 1.0)
    write_checkpoint(Path(config.out), config.train.steps)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "adapter").mkdir()
    for task in run.METRICS:
        (tmp_path / "evaluation" / f"diagnosis-{task}.json").touch()
    (tmp_path / "adapter" / "w2r2_card.json").touch()
    run.run_demo()
    prepare, report = commands
    assert prepare[1:] == ("launchers/prepare.py", "demo") and report[1] == "launchers/report.py"
    options = dict(zip(report[2::2], report[3::2], strict=True))
    evaluation, page = str(tmp_path / "evaluation"), str(tmp_path / "report.html")
    assert options == {"--run": config.out, "--results": evaluation, "--out": page}
    commands.clear()
    monkeypatch.setattr(run, "import_problem", lambda package: "is not installed" if package == "plotly" else "")
    run.run_demo()
    assert [words[1] for words in commands] == ["launchers/prepare.py"]
    (tmp_path / "evaluation" / "diagnosis-scanqa.json").unlink()
    commands.clear()
    run.run_demo()
    assert [words[1] for words in commands] == ["launchers/prepare.py", "launchers/diagnose.py"]


def test_the_geometry_of_the_demo_is_passed_to_its_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scenes, models and training get the option; the other commands get it from the checkpoint."""
    commands: list[tuple[str, ...]] = []

    def command(*words: str) -> None:
        commands.append(words)
        if words[0] == "deepspeed":
            sys.exit("stop here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_command", command)
    with pytest.raises(SystemExit, match="stop here"):
        demo.main(["--demo.geometry", "vggt"])
    assert all(words[-2:] == ("--demo.geometry", "vggt") for words in commands) and len(commands) == 2
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--demo.geometry", "nerf"])
    assert stopped.value.code == 1


def test_few_parsed_answers_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config(overrides=["--out", str(tmp_path / "train")])
    write_checkpoint(Path(config.out), config.train.steps)
    monkeypatch.setattr(run, "load_config", lambda overrides: config)
    monkeypatch.setattr(run, "run_command", lambda *_: None)
    monkeypatch.setattr(run, "print_results", lambda *_: 0.94)
    with pytest.raises(SystemExit, match=r"94\.0%"):
        run.run_demo()
