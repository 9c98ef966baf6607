"""ScanRefer's samples, VG-LLM's strings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hand_scene import SCENE, entry, write_annotations
from w2r2_ds.data.boxes import camera_to_world
from w2r2_ds.data.tasks.scanrefer import (
    answer_text,
    build_samples,
    question_text,
)


def test_strings_are_vgllms() -> None:
    assert question_text("the Chair is RED. It stands by the table.") == (
        "Localize the first clear frame in the video showing the object described in the text.\n"
        "Text: The chair is red. it stands by the table.\n"
        'Output a JSON dictionary with the frame index in "frame" and its 3D bounding box in "bbox_3d" '
        "in the frame's coordinates.\n"
    )
    box = np.array([-0.634, -0.83, 2.431, 2.999, 0.59, 2.35, -2.32, 1.18, 3.05])
    expected = '```json\n\t{"frame": 12, "bbox_3d": [-0.63, -0.83, 2.43, 3.0, 0.59, 2.35, -2.32, 1.18, 3.05]}\n```'
    assert answer_text(12, box) == expected
    assert "[-0.6, -0.8, 2.4, 3.0," in answer_text(12, box, decimals=1)


def test_braces_in_a_description_are_kept() -> None:
    assert "Text: The {box}.\n" in question_text("the {box}.")


def test_samples(root: Path) -> None:
    entries = [entry(), entry(4, "table", 1, "the table."), entry(3, "lamp", 0, "a hidden lamp.")]
    samples, dropped = build_samples(root, write_annotations(root, entries), "train", 3)
    assert dropped == {"no_visible_frame": 1, "invalid_pose_frames": 1}
    assert [sample.id for sample in samples] == [f"{SCENE}|0|office_chair|0", f"{SCENE}|4|table|1"]
    first = samples[0]
    assert (first.task, first.scene_id, first.target.object_name) == ("scanrefer", SCENE, "office chair")
    assert [path.name for path in first.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert first.cam_to_world.shape == (3, 4, 4)
    np.testing.assert_array_equal(first.target.box, [2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 0.0, 0.0, 0.0])
    answer = json.loads(first.answer.strip("`").removeprefix("json"))
    assert answer["frame"] == 1
    assert answer["bbox_3d"][:6] == [1.0, 0.5, 2.0, 0.8, 0.6, 1.0]  # by hand: frame 1 stands at (1, 3, 1.5)
    world = camera_to_world(np.array(answer["bbox_3d"]), first.cam_to_world[answer["frame"]])
    np.testing.assert_allclose(world[:6], first.target.box[:6], atol=0.006)


def test_validation_keeps_what_no_frame_shows(root: Path) -> None:
    file = write_annotations(root, [entry(3, "lamp"), entry()], "val")
    samples, dropped = build_samples(root, file, "val", 3)
    assert dropped == {"no_visible_frame": 0, "invalid_pose_frames": 1}
    assert samples[0].answer == ""
    assert samples[1].answer.startswith("```json\n\t{")


def test_unknown_object_names_file_entry_and_scene(root: Path) -> None:
    file = write_annotations(root, [entry(), entry(99)])
    with pytest.raises(
        ValueError, match=rf"train.json: line 1 \(entry 2\): field 'object_id' is 99, which scene {SCENE} does not"
    ):
        build_samples(root, file, "train", 2)


def test_a_bad_split_is_an_error(root: Path) -> None:
    file = write_annotations(root, [entry()])
    with pytest.raises(ValueError, match="split is 'test'"):
        build_samples(root, file, "test", 2)  # type: ignore[arg-type]
