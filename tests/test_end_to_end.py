"""Every task in ScanNet's layout with the user's commands: prepare, train 4 steps, evaluate, score again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import ZERO3, Job, World, run_jobs
from w2r2_ds.commands import evaluate, prepare

STEPS, MIXED_STEPS, FRAMES = 4, 3, 2
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
"""Path of keys to a score in the result."""


@pytest.fixture(scope="module")
def prepared(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per task and split, made by launchers/prepare.py from the synthetic rooms' own annotation files."""
    out = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for task, options in PREPARE.items():
            where = ["--root", str(world.folder / "scenes"), "--out", str(out / task), "--workers", "1"]
            patch.setattr(sys, "argv", ["prepare.py", task, *where, *options])
            assert prepare.main() == 0
    return out


@pytest.fixture(scope="module")
def trained(world: World, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps per task under ZeRO-3, and a short one of all tasks mixed; one launch."""
    folder = tmp_path_factory.mktemp("trained")

    def job(name: str, tasks: list[str], steps: int) -> Job:
        sources = {
            split: json.dumps([{"path": str(prepared / task / split)} for task in tasks]) for split in ("train", "val")
        }
        options = world.arguments(
            folder / name,
            data__train=sources["train"],
            data__val=sources["val"],
            data__max_length=2048,
            # What a detection says is ten times as long.
            train__global_batch=1 if tasks == ["detection"] else 4,
            train__micro_batch=1 if tasks == ["detection"] else 4,
            train__steps=steps,
            train__save_every=steps,
        )
        return Job(name, ["--deepspeed", str(ZERO3), *options])

    steps = dict.fromkeys(PREPARE, STEPS) | {"mixed": MIXED_STEPS}
    jobs = [job(name, [name] if name in PREPARE else list(PREPARE), count) for name, count in steps.items()]
    for name, (report,) in run_jobs(1, folder / "jobs", jobs).items():
        assert report["error"] is None and report["updates"] == steps[name], (name, report)
    return folder


@pytest.mark.parametrize("task", PREPARE)
def test_every_task_from_annotations_to_scores(task: str, prepared: Path, trained: Path, tmp_path: Path) -> None:
    manifest = json.loads((prepared / task / "val" / "manifest.json").read_text())
    assert manifest["task"] == task and manifest["counts"]["samples"] > 0
    count = min(4, manifest["counts"]["samples"])
    evaluate.run(trained / task, task, out=tmp_path, limit=count, max_new_tokens=64)
    scores = json.loads((tmp_path / f"scores-{task}-fused.json").read_text())
    again = evaluate.run(score_only=tmp_path / f"predictions-{task}-fused.jsonl")
    protocol, value = SCORES[task]
    for each in (scores, again):
        result: dict[str, Any] = each["protocols"][protocol]
        assert result["count"] == count
        assert 0.0 <= value(result) <= 10.0
    assert again["protocols"] == scores["protocols"], "records score themselves again without the model"


def test_a_mixed_run_answers_every_task(trained: Path, tmp_path: Path) -> None:
    for task in PREPARE:
        evaluate.run(trained / "mixed", task, out=tmp_path, limit=2, max_new_tokens=8)
        lines = (tmp_path / f"predictions-{task}-fused.jsonl").read_text().splitlines()
        assert [json.loads(line)["task"] for line in lines] == [task, task]
