"""The demo's stand-ins never take the place of something else; its program asks before it works."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import ROOT
from w2r2_ds.config.io import load_config
from w2r2_ds.demo import run
from w2r2_ds.demo.assets import prepare_models


def test_it_does_not_build_a_tiny_model_under_another_name() -> None:
    config = load_config(overrides=["--model.vlm", "Qwen/Qwen2.5-VL-3B-Instruct"])
    with pytest.raises(ValueError, match=r"Qwen/Qwen2.5-VL-3B-Instruct.*--demo.enabled false"):
        prepare_models(config)
    assert not Path("Qwen").exists()


@pytest.mark.parametrize("present", ["vlm", "vggt"])
def test_it_does_not_overwrite_models_it_did_not_make(tmp_path: Path, present: str) -> None:
    (tmp_path / present).mkdir()
    (tmp_path / present / "config.json").write_text("{}")
    args = ["--model.vlm", str(tmp_path / "vlm"), "--model.geometry.path", str(tmp_path / "vggt")]
    with pytest.raises(ValueError, match="was not made with these"):
        prepare_models(load_config(overrides=args))
    assert (tmp_path / present / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--steps", 2)])
def test_help_and_a_wrong_option_start_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, status: int
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo starts")

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr("sys.argv", ["demo.py", argument])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "launchers" / "demo.py"), run_name="__main__")
    assert stopped.value.code == status
    said = capsys.readouterr()
    assert "runs/demo" in said.out if status == 0 else "--steps" in said.err


def test_it_trains_on_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another run, or another demo, may have the launcher's 29500."""
    ports = []

    def command(*words: str) -> None:
        if words[0] == "deepspeed":
            ports.append(int(words[words.index("--master_port") + 1]))
            sys.exit("seen enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", command)
    monkeypatch.setattr(run, "free_port", iter([41234, 41235]).__next__)
    for _ in range(2):
        with pytest.raises(SystemExit, match="seen enough"):
            run.run_demo()
    assert ports == [41234, 41235]
