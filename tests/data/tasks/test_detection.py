"""Detection: windows of frames, visible objects in the first frame's camera, and the exact form of the answer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np

from hand_scene import SCENE, prepared_items, write_infos
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.tasks.detection import QUESTION, answer_text

HAND = {"interval": 1, "step": 1}


def test_prompt_and_answer_strings() -> None:
    assert QUESTION == (
        "\nDetect the 3D bounding boxes in the camera coordinate system of the first frame.\n"
        'Output a json list where each entry contains the object name in "label" and its 3D bounding box in '
        '"bbox_3d".\n'
        "The 3D bounding box format should be "
        "[x_center, y_center, z_center, x_size, y_size, z_size, yaw, roll, pitch]."
    )
    assert answer_text([]) == "```json\n[\n\t\n]```"


def test_objects_by_hand(root: Path) -> None:
    write_infos(root)
    first, second = prepared_items(root, "detection", **HAND)
    assert [each.id for each in (first, second)] == [f"{SCENE}|00000", f"{SCENE}|00001"]
    # Frame 0 shows the wall and the chair, frame 1 the table too; the wall is skipped. A yaw of 0.3 is, in a level
    # camera, a1 = 90 degrees - 0.3 and a0 = -a2 = 90 degrees.
    assert first.answer == (
        "```json\n[\n"
        '\t{"label": "chair", "bbox_3d": [1.0, 0.5, 3.0, 0.8, 0.6, 1.0, 0.0, 1.57, 0.0]},\n'
        '\t{"label": "table", "bbox_3d": [-1.0, 0.5, 3.0, 0.6, 0.6, 0.6, 1.57, 1.27, -1.57]}\n'
        "]```"
    )
    assert (first.task, first.kind, first.target, first.question) == ("detection", "answer", None, QUESTION)
    assert [each.label for each in first.objects] == ["chair", "table"]
    world = camera_to_world(first.objects[1].box, first.cam_to_world[0])
    np.testing.assert_allclose(world, [0.0, 5.0, 1.0, 0.6, 0.6, 0.6, 0.3, 0.0, 0.0], atol=1e-9)
    assert [each["label"] for each in json.loads(second.answer.strip("`").removeprefix("json"))] == ["chair", "table"]
    assert "[1.0, 0.5, 2.0, 0.8," in second.answer, "in the camera of its own first frame"


def test_windows_take_every_third_frame_of_a_run(root: Path) -> None:
    write_infos(root)
    assert [len(each.frames) for each in prepared_items(root, "detection", interval=2, step=1)] == [2]
    for options in ({"interval": 3, "step": 1}, {"interval": 1, "step": 10}):
        # Three frames are too few for a window of frames 0 and 3; with step 10, frames 0 and 1 are no neighbours.
        (dropped,) = prepared_items(root, "detection", **options)
        assert (dropped.id, dropped.reason) == (SCENE, "no_window") and SCENE in dropped.location


def test_windows_are_subsampled_by_seed(root: Path) -> None:
    write_infos(root, "val")
    one = prepared_items(root, "detection", "val", windows=1, **HAND)
    again = prepared_items(root, "detection", "val", windows=1, **HAND)
    assert len(one) == 1 and one[0].id == again[0].id
    assert len(prepared_items(root, "detection", "val", windows=5, **HAND)) == 2


def test_an_object_with_a_broken_box_is_no_object(root: Path) -> None:
    write_infos(root)
    path = root / "embodiedscan" / "embodiedscan_infos_train.pkl"
    content = pickle.loads(path.read_bytes())
    content["data_list"][0]["instances"][0]["bbox_3d"] = [np.inf] * 9
    path.write_bytes(pickle.dumps(content))
    first, _ = prepared_items(root, "detection", **HAND)
    assert [each.label for each in first.objects] == ["table"]
