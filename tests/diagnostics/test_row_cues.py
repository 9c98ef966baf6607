"""Shares of rows that follow the cue of a shifted split, in camera and in world coordinates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hand_records import BOX, beside, camera_answer, grounding, in_world
from prepared_sets import write_prepared
from w2r2_ds.commands.diagnose import main
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.shortcut_cues import cues_file, write_cues
from w2r2_ds.diagnostics.row_cues import cue_results, cues_of
from w2r2_ds.diagnostics.table1 import Row
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.types.sample import Sample

FRAMES = ("00003.jpg", "00007.jpg")
CAMERA_CUE, WORLD_CUE = 3.0, -3.0
"""The cues are the true box, moved by so many metres along x."""


def rooms(root: Path) -> list[Sample]:
    samples = [grounding("0", number, f"scene{number:04d}_00") for number in range(6)]
    return [replace(each, frames=tuple(root / name for name in FRAMES)) for each in samples]


def shifted_set(root: Path, samples: list[Sample]) -> PreparedSet:
    """A prepared set of the split val_camera; the cue of the last sample is missing in all frames."""
    entries: list[dict[str, Any]] = []
    for sample in samples:
        frame = {"area": 9.0, "camera": beside(CAMERA_CUE).tolist(), "world": beside(WORLD_CUE).tolist()}
        frames = [] if sample is samples[-1] else [{"frame": number, **frame} for number in (3, 7)]
        about = {"id": sample.id, "paired_id": sample.id, "shift": "camera", "scene_id": sample.scene_id}
        entries.append(
            {
                **about,
                "object_id": 1,
                "parameters": {},
                "truth": BOX.tolist(),
                "paired_truth": BOX.tolist(),
                "frames": frames,
            }
        )
    file = cues_file(root, "val_camera")
    file.parent.mkdir()
    write_cues(file, entries)
    return PreparedSet(write_prepared(root / "set", samples, root, options={"split": "val_camera"}), root)


def shares(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row[name]["value"] for name in ("truth", "cue", "neither"))


def test_answers_in_a_camera_follow_the_cue_of_their_frame(tmp_path: Path) -> None:
    samples = rooms(tmp_path)
    prepared = shifted_set(tmp_path, samples)
    boxes = [None, beside(CAMERA_CUE), beside(CAMERA_CUE), beside(WORLD_CUE), beside(9), None]
    right = [record_of(sample, camera_answer(sample)) for sample in samples]
    mixed = [record_of(sample, camera_answer(sample, 1, box)) for sample, box in zip(samples, boxes, strict=True)]
    broken = [record_of(sample, "no box") for sample in samples]
    rows = [Row("right", "", [right]), Row("mixed", "", [mixed]), Row("both", "", [right, broken])]
    results = cue_results(rows, list(prepared), cues_of([prepared]), 100, 0)
    for measure in ("iou", "centre"):
        assert {name: each[measure]["scored"] for name, each in results.items()} == {"right": 5, "mixed": 5, "both": 10}
        assert shares(results["right"][measure]) == (1, 0, 0)
        assert shares(results["mixed"][measure]) == pytest.approx((0.2, 0.4, 0.4))
        assert shares(results["both"][measure]) == (0.5, 0, 0.5)
        assert results["mixed"][measure]["cue"]["low"] < 0.4 < results["mixed"][measure]["cue"]["high"]


def test_world_answers_follow_the_cue_in_the_world(tmp_path: Path) -> None:
    samples = [in_world(sample) for sample in rooms(tmp_path)]
    prepared = shifted_set(tmp_path, samples)

    def answer(shift: float) -> str:
        low, high = beside(shift)[:3] - BOX[3:6] / 2, beside(shift)[:3] + BOX[3:6] / 2
        return ",".join(f"{value:.4f}" for value in (*low, *high))

    texts = [answer(WORLD_CUE), answer(WORLD_CUE), answer(CAMERA_CUE), answer(0), answer(0), answer(0)]
    records = [record_of(sample, text) for sample, text in zip(samples, texts, strict=True)]
    results = cue_results([Row("fused", "", [records])], list(prepared), cues_of([prepared]), 100, 0)
    assert shares(results["fused"]["iou"]) == pytest.approx((0.4, 0.4, 0.2))


def test_the_command_adds_cues_of_a_shifted_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = rooms(tmp_path)
    prepared = shifted_set(tmp_path, samples)
    file = tmp_path / "p.jsonl"
    lines = [json.dumps(record_of(each, camera_answer(each, box=beside(CAMERA_CUE)))) + "\n" for each in samples]
    file.write_text("".join(lines))
    words = ["--predictions", f"2D={file}", "--data", str(prepared.folder), "--root", str(tmp_path), "--limit", "4"]
    assert main([*words, "--out", str(tmp_path / "out"), "--resamples", "100"]) == 0
    result = json.loads((tmp_path / "out" / "diagnosis-scanrefer.json").read_text())
    assert result["cues"]["2D"]["iou"]["scored"] == 4 and shares(result["cues"]["2D"]["iou"]) == (0, 1, 0)
    assert "2D cue" in capsys.readouterr().out


def test_other_sets_have_no_cues(tmp_path: Path) -> None:
    samples = rooms(tmp_path)
    shifted_set(tmp_path, samples)
    plain = PreparedSet(write_prepared(tmp_path / "plain", samples, tmp_path, options={"split": "val"}), tmp_path)
    assert cues_of([plain]) == {}
    results = cue_results([Row("a", "", [[record_of(each, "x") for each in samples]])], samples, {}, 100, 0)
    assert results["a"]["iou"]["scored"] == 0 and results["a"]["iou"]["cue"]["reason"]
