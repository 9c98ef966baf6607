"""Text files with a byte order mark, as Windows editors write them, are read like those without one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import trimesh

from hand_records import question
from hand_scene import (
    ALIGN,
    SCENE,
    entry,
    question_entry,
    write_annotations,
    write_proposals,
    write_questions,
    write_scene,
)
from w2r2_ds.config.io import read_yaml
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepare.scannet_boxes import write_boxes
from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet
from w2r2_ds.data.sources.scannet import boxes_file
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.files.json_io import read_json_object

MARK = b"\xef\xbb\xbf"
EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = (".txt", ".json", ".jsonl", ".tsv", ".yaml")
LISTED = FrameOptions("list", 2, file=Path("frames.json"))
TASKS = [
    TaskOptions("scanrefer", "train", frames=FrameOptions("uniform", 2), visibility="depth"),
    TaskOptions("scan2cap", "val", frames=FrameOptions("uniform", 2)),
    TaskOptions("scanqa", "val", "video3dllm", LISTED),
]


def add_marks(folder: Path) -> list[str]:
    """Add a byte order mark to every text file below a folder; returns their names."""
    files = [path for path in folder.rglob("*") if path.suffix in TEXTS and path.name != MANIFEST]
    for path in files:
        path.write_bytes(MARK + path.read_bytes())
    return [path.name for path in files]


def write_all(root: Path) -> None:
    write_scene(root)
    (root / "scannetv2-labels.combined.tsv").write_text("raw_category\tnyu40id\tnyu40class\nchair\t5\tchair\n")
    for split in ("train", "val"):
        write_annotations(root, [entry()], split)
        write_questions(root, [question_entry()], split)
    write_proposals(root, [[2, 5, 1, 1, 1, 1]])
    (root / "frames.json").write_text(json.dumps({SCENE: [1, 0]}))


def samples(root: Path, options: TaskOptions, out: str) -> list[Sample]:
    return list(PreparedSet(prepare(root, options, root / out, quiet=True).folder, root))


def comparable(sample: Sample) -> dict[str, object]:
    poses = sample.cam_to_world.tobytes()
    return {**vars(sample), "cam_to_world": poses, "target": sample.target and str(vars(sample.target))}


@pytest.mark.parametrize("options", TASKS, ids=lambda options: options.task)
def test_preparations(tmp_path: Path, options: TaskOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations, labels, proposals, poses, intrinsics, alignment and lists of frames."""
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    expected = list(map(comparable, samples(tmp_path, options, "first")))
    names = add_marks(tmp_path)
    assert {f"{SCENE}.txt", "00000.txt", "intrinsic.txt", "scannetv2-labels.combined.tsv", "frames.json"} < set(names)
    assert list(map(comparable, samples(tmp_path, options, "second"))) == expected
    manifest = tmp_path / "second" / MANIFEST
    manifest.write_bytes(MARK + manifest.read_bytes())
    assert list(map(comparable, PreparedSet(tmp_path / "second", tmp_path))) == expected


def test_boxes(tmp_path: Path) -> None:
    write_all(tmp_path)
    box, folder = trimesh.creation.box((2.0, 1.0, 0.5)), tmp_path / "scans" / SCENE
    (folder / f"{SCENE}_vh_clean_2.ply").write_bytes(box.export(file_type="ply"))
    segments = {"segIndices": [7] * len(box.vertices)}
    (folder / f"{SCENE}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    groups = {"segGroups": [{"objectId": 0, "label": "chair", "segments": [7]}]}
    (folder / f"{SCENE}.aggregation.json").write_text(json.dumps(groups))
    write_boxes(tmp_path, SCENE)
    expected = np.load(boxes_file(tmp_path, SCENE))
    add_marks(tmp_path)
    boxes_file(tmp_path, SCENE).unlink()
    write_boxes(tmp_path, SCENE)
    np.testing.assert_array_equal(np.load(boxes_file(tmp_path, SCENE)), expected)
    np.testing.assert_allclose(expected[0, :3], ALIGN[:3, 3])


def test_predictions(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(record_of(question(0), "two")) + "\n")
    expected = score_file(file)["protocols"]
    add_marks(tmp_path)
    assert score_file(file)["protocols"] == expected


def test_configurations(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train:\n  lr: 0.5\n")
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    add_marks(tmp_path)
    assert read_yaml(tmp_path / "recipe.yaml") == {"train": {"lr": 0.5}}
    assert read_json_object(tmp_path / "zero.json") == {"zero_optimization": {"stage": 2}}


def test_own_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"scene": SCENE, "question": "How many?", "answers": ["2"]}) + "\n")
    add_marks(tmp_path)
    (read,) = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["scanqa_entries"](file)
    assert read["question"] == "How many?"
