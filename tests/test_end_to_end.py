"""Every task in the real layout, by the commands a user types: prepare -> train 20 steps -> evaluate -> score again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import ROOT, ZERO3, Job, World, environment, run_jobs

STEPS, FRAMES = 20, 2
PREPARE = {
    "scanrefer": ["--frames.protocol", "vgllm", "--frames.count", str(FRAMES)],
    "scan2cap": ["--frames.protocol", "scene_sets", "--frames.count", str(FRAMES)],
    "scanqa": ["--frames.protocol", "coverage", "--frames.count", str(FRAMES)],
    "detection": ["--count", str(FRAMES), "--interval", "2", "--step", "1", "--windows", "3", "--train_windows", "4"],
}
SCORES = {
    "scanrefer": ("scanrefer/vgllm-direct", lambda result: result["overall"]["mean_iou"]),
    "scan2cap": ("scan2cap/vgllm", lambda result: result["at"]["0.5"]["corpus"]["CIDEr"]),
    "scanqa": ("scanqa/video3dllm", lambda result: result["corpus"]["EM"]),
    "detection": ("detection/f1", lambda result: result["at"]["0.25"]["F1"]),
}
"""What a result is read by; a KeyError is a failure of the test."""


def launcher(name: str, *arguments: object) -> str:
    """Run a launcher; its output."""
    command = [sys.executable, f"launchers/{name}.py", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def prepared(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per task and split, made by launchers/prepare.py from the synthetic rooms' own annotation files."""
    out = tmp_path_factory.mktemp("prepared")
    for task, options in PREPARE.items():
        launcher("prepare", task, "--root", world.folder / "scenes", "--out", out / task, "--workers", 1, *options)
    return out


@pytest.fixture(scope="module")
def trained(world: World, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps per task, and one of all tasks mixed; one launch of two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("trained")

    def job(name: str, tasks: list[str]) -> Job:
        sources = {
            split: json.dumps([{"path": str(prepared / task / split)} for task in tasks]) for split in ("train", "val")
        }
        options = world.arguments(
            folder / name,
            data__train=sources["train"],
            data__val=sources["val"],
            data__max_length=2048,
            train__steps=STEPS,
            train__save_every=STEPS,
        )
        return Job(name, ["--deepspeed", str(ZERO3), *options])

    jobs = [*(job(task, [task]) for task in PREPARE), job("mixed", list(PREPARE))]
    for name, reports in run_jobs(2, folder / "jobs", jobs).items():
        assert [report["error"] for report in reports] == [None, None], name
        assert reports[0]["updates"] == STEPS, name
    return folder


@pytest.mark.parametrize("task", PREPARE)
def test_a_task_from_its_files_to_its_score(task: str, prepared: Path, trained: Path, tmp_path: Path) -> None:
    manifest = json.loads((prepared / task / "val" / "manifest.json").read_text())
    assert manifest["task"] == task and manifest["counts"]["samples"] > 0
    run, count = trained / task, min(6, manifest["counts"]["samples"])
    launcher(
        "evaluate", "--checkpoint", run, "--task", task, "--out", tmp_path, "--limit", count, "--max_new_tokens", 96
    )
    scores = json.loads((tmp_path / f"scores-{task}-fused.json").read_text())
    again = json.loads(launcher("evaluate", "--score_only", tmp_path / f"predictions-{task}-fused.jsonl"))
    protocol, value = SCORES[task]
    for each in (scores, again):
        result: dict[str, Any] = each["scores"][protocol]
        assert result["count"] == count
        assert 0.0 <= value(result) <= 10.0
    assert again["scores"] == scores["scores"], "records score themselves again without the model"


def test_the_mixed_run_answers_every_task(prepared: Path, trained: Path, tmp_path: Path) -> None:
    for task in PREPARE:
        launcher("evaluate", "--checkpoint", trained / "mixed", "--task", task, "--out", tmp_path, "--limit", 2)
        lines = (tmp_path / f"predictions-{task}-fused.jsonl").read_text().splitlines()
        assert [json.loads(line)["task"] for line in lines] == [task, task]
