"""Test splits: no boxes, no alignment, no answers; samples can be made and answered, but not scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_scene import CAMERA, SCENE, entry, prepared_items, question_entry, write_annotations, write_questions
from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepare.scannet_boxes import write_all_boxes
from w2r2_ds.data.prepare.trial import try_preparation
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.sources.frames import SceneParts
from w2r2_ds.data.sources.scannet import alignment_file, boxes_file, load_scene
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.predictions.rescore import score_file
from w2r2_ds.evaluation.scoring import NOT_SCORED
from w2r2_ds.utils.findings import by_kind

TWO = FrameOptions("uniform", 2)
PROPOSED = [[2.0, 5.0, 1.0, 0.8, 0.6, 1.0], [0.0, 5.0, 1.0, 0.6, 0.6, 0.6]]
SPLITS = [
    TaskOptions("scanqa", "test_wo_obj", "video3dllm", TWO),
    TaskOptions("scanqa", "test_w_obj", "video3dllm", TWO),
    TaskOptions("scanrefer", "test", "vgllm", TWO),
    TaskOptions("scanrefer", "test", "video3dllm", FrameOptions("scene_sets", 2)),
    TaskOptions("scan2cap", "test", "vgllm", FrameOptions("vgllm", 2)),
    TaskOptions("scan2cap", "test", "video3dllm", TWO),
]
named = pytest.mark.parametrize("options", SPLITS, ids=lambda each: f"{each.task}-{each.split}-{each.format}")


@pytest.fixture
def hidden(root: Path) -> Path:
    """The scene as a hidden test scan, with the annotations of the test splits."""
    boxes_file(root, SCENE).unlink()
    alignment_file(root, SCENE).write_text("colorHeight = 968\ncolorWidth = 1296\n")
    (root / "scannetv2-labels.combined.tsv").unlink()
    bare = {name: value for name, value in question_entry().items() if name in ("scene_id", "question_id", "question")}
    write_questions(root, [bare], "test_wo_obj")
    write_questions(root, [question_entry() | {"answers": None}], "test_w_obj")
    write_annotations(root, [entry(), entry(0, ann_id=1)], "test")
    file = root / "proposals" / "scannet_test_pred_box.json"
    file.parent.mkdir()
    file.write_text(json.dumps({f"scannet/{SCENE}": PROPOSED}))
    return root


@named
def test_a_test_split_is_prepared_answered_and_not_scored(hidden: Path, options: TaskOptions) -> None:
    assert try_preparation(hidden, options, quiet=True).problems == ()
    done = prepare(hidden, options, hidden / "out", quiet=True)
    samples = list(PreparedSet(done.folder, hidden))
    assert len(samples) == {"scanqa": 1, "scanrefer": 2, "scan2cap": 2}[options.task]
    assert all(each.frames and not each.is_annotated and each.target is None for each in samples)
    file = hidden / "predictions.jsonl"
    file.write_text("".join(json.dumps(record_of(each, "an answer")) + "\n" for each in samples))
    for scores in (score_file(file), score_file(file, data=done.folder), score_file(file, protocols=["all"])):
        assert (scores["protocols"], scores["not_scored"], scores["samples"]) == ({}, NOT_SCORED, len(samples))


IMAGES = [f"scannet/posed_images/{SCENE}/00000.jpg"]
VGLLM_REFER = {
    "filtered_resps": ["x"],
    "scanrefer_score": {"images": IMAGES},
    "doc": {
        "metadata": {"object_id": "0", "ann_id": "0"},
        "axis_align_matrix": np.eye(4).tolist(),
        "cam2global": [np.eye(4).tolist()],
    },
}
VGLLM_CAP = {"filtered_resps": ["x"], "scan2cap_score": {"images": IMAGES}, "doc": {"annotations": ["a"], "iou": 0.5}}
VIDEO3D_REFER = {
    "prompt": "The following description.\nthe red chair.",
    "pred_response": "x",
    "gt_response": [0, 0, 0, 1, 1, 1],
}
VIDEO3D_QA = {"sample_id": question_entry()["question_id"], "pred_response": "x"}


@pytest.mark.parametrize(
    ("options", "line"),
    [(SPLITS[0], VIDEO3D_QA), (SPLITS[2], VGLLM_REFER), (SPLITS[3], VIDEO3D_REFER), (SPLITS[4], VGLLM_CAP)],
)
def test_predictions_of_other_projects_for_a_test_split_are_not_scored(
    hidden: Path, options: TaskOptions, line: dict[str, Any]
) -> None:
    done = prepare(hidden, options, hidden / "out", quiet=True)
    file = hidden / "theirs.jsonl"
    file.write_text(json.dumps(line) + "\n")
    scores = score_file(file, options.format, done.folder, hidden)
    assert (scores["protocols"], scores["not_scored"]) == ({}, NOT_SCORED)


def test_the_raw_world_replaces_the_missing_alignment(hidden: Path) -> None:
    raw = load_scene(hidden, SCENE, SceneParts.POSES)
    np.testing.assert_array_equal(raw.axis_align, np.eye(4))
    np.testing.assert_allclose(raw.frames[0].cam_to_world, np.loadtxt(raw.frames[0].color.with_suffix(".txt")))
    np.save(boxes_file(hidden, SCENE), np.ones((1, 8)))
    with pytest.raises(ValueError, match="axisAlignment"):
        load_scene(hidden, SCENE, SceneParts.POSES | SceneParts.BOXES)


@pytest.mark.parametrize("others", [{}, {"object_id": "", "object_name": "", "ann_id": "0", "token": []}])
def test_scanrefers_test_entries_may_lack_the_object(hidden: Path, others: dict[str, Any]) -> None:
    bare = {name: value for name, value in entry().items() if name in ("scene_id", "description")}
    bare.update(others)  # two objects may have a sentence with ann_id 0
    write_annotations(hidden, [bare, bare], "test")
    made = prepared_items(hidden, "scanrefer", "test")
    assert [each.id for each in made] == [f"{SCENE}|0|unknown|0", f"{SCENE}|0|unknown|1"]
    write_annotations(hidden, [bare], "val")
    with pytest.raises(ValueError, match="entry 1: field 'object_id'"):
        prepared_items(hidden, "scanrefer", "val")


def test_scan2cap_describes_every_proposed_box(hidden: Path) -> None:
    first, second = prepared_items(hidden, "scan2cap", "test")
    assert (first.id, second.id) == (f"{SCENE}|0", f"{SCENE}|1")
    centre = world_to_camera(np.array([*PROPOSED[1], 0, 0, 0]), second.cam_to_world[0])[:3]
    assert f"located at {[round(float(value), 2) for value in centre]}" in second.question
    assert not np.allclose(second.cam_to_world[0], CAMERA), "the raw world"


def test_broken_proposals_of_the_test_split_do_not_block_the_others(hidden: Path) -> None:
    """Captions are identified by the index of the box in the file."""
    options = TaskOptions("scan2cap", "test", frames=TWO)
    file = hidden / "proposals" / "scannet_test_pred_box.json"
    boxes = [PROPOSED[0], [1, 1, 1, 0, 1, 1], PROPOSED[1]]
    file.write_text(json.dumps({f"scannet/{SCENE}": boxes}))
    assert any("broken boxes in the proposals" in line for line in try_preparation(hidden, options).skipped_inputs)
    done = prepare(hidden, options, hidden / "one", quiet=True)
    assert [each.id for each in PreparedSet(done.folder, hidden)] == [f"{SCENE}|0", f"{SCENE}|2"]
    (line,) = (line for line in done.manifest["skipped_inputs"] if "boxes in the proposals" in line)
    assert line.startswith("1 broken") and f"scannet/{SCENE}[1]" in line
    file.write_text(json.dumps({f"scannet/{SCENE}": boxes, "scene0001_00": "x"}))
    with pytest.raises(ValueError, match=r"1 of 2 scenes cannot be used.*\n.*field 'scene0001_00': must be a list"):
        prepare(hidden, options, hidden / "two", skip_broken_scenes=False, quiet=True)
    done = prepare(hidden, options, hidden / "two", skip_broken_scenes=True, quiet=True)
    assert done.manifest["counts"]["samples"] == 2


def test_boxes_skip_hidden_scans_and_name_them_once(hidden: Path) -> None:
    done = write_all_boxes(hidden)
    assert (done.written, done.existing) == (0, 0)
    (line,) = by_kind(done.findings)
    assert line.startswith("1 scans of ScanNet's hidden test split") and SCENE in line


def test_an_annotated_scan_without_its_files_is_not_hidden(root: Path) -> None:
    boxes_file(root, SCENE).unlink()
    with pytest.raises(ValueError, match=f"{SCENE}.aggregation.json does not exist"):
        write_all_boxes(root)


def test_a_mixture_of_annotated_and_hidden_answers_is_an_error(hidden: Path) -> None:
    (sample,) = prepared_items(hidden, "scanqa", "test_wo_obj", format="video3dllm")
    records = [record_of(sample, "x"), record_of(sample, "x") | {"id": "other", "annotated": True}]
    (hidden / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"1 samples have no annotated answers.*val-scene0000-0"):
        score_file(hidden / "p.jsonl")
