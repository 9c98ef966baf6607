"""ScanRefer's annotations, VG-LLM's strings, the unique/multiple rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hand_scene import SCENE, entry, write_annotations
from w2r2_ds.data.boxes import camera_to_world
from w2r2_ds.data.scannet import load_labels
from w2r2_ds.data.tasks.scanrefer import (
    Annotation,
    answer_text,
    build_samples,
    load_annotations,
    object_groups,
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


def test_groups_by_the_original_rule(root: Path) -> None:
    def annotated(object_id: int, name: str, scene: str = SCENE) -> Annotation:
        return Annotation(scene, object_id, name, "0", "x")

    annotations = [
        annotated(3, "chair"),
        annotated(5, "office_chair"),
        annotated(7, "table"),
        annotated(7, "table"),  # a second sentence about the same object changes nothing
        annotated(8, "refrigerator"),  # NYU40's "refridgerator" is "others", as are lamps and unknown names
        annotated(9, "what_is_it"),
        annotated(3, "lamp", "scene0001_00"),
    ]
    groups = object_groups(annotations, load_labels(root))
    multiple = {key for key, group in groups.items() if group == "multiple"}
    assert multiple == {(SCENE, 3), (SCENE, 5), (SCENE, 8), (SCENE, 9)}
    assert groups[SCENE, 7] == groups["scene0001_00", 3] == "unique"


def test_unknown_object_names_file_entry_and_scene(root: Path) -> None:
    file = write_annotations(root, [entry(), entry(99)])
    with pytest.raises(ValueError, match=rf"train.json: entry 1 names object_id 99, which scene {SCENE} does not have"):
        build_samples(root, file, "train", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"description": "  "}, "entry 1: field 'description' is missing or empty"),
        ({"description": None}, "entry 1: field 'description'"),
        ({"object_id": "a"}, "entry 1: field 'object_id' is 'a', not a number"),
        ({"object_id": True}, "entry 1: field 'object_id'"),
        ({"object_id": "-1"}, "entry 1: field 'object_id' is '-1'"),
        ({"object_name": ""}, "entry 1: field 'object_name'"),
        ({"scene_id": "../up"}, "entry 1: field 'scene_id'"),
        ({"scene_id": 3}, "entry 1: field 'scene_id'"),
        ({"ann_id": []}, "entry 1: field 'ann_id'"),
        ({"token": "the chair"}, "entry 1: field 'token' must be a list of strings"),
        ({"ann_id": "0"}, "entry 1 repeats the scene, object and ann_id of entry 0"),
    ],
)
def test_bad_entries_are_named(root: Path, change: dict[str, Any], message: str) -> None:
    file = write_annotations(root, [entry(), {**entry(ann_id=1), **change}])
    with pytest.raises(ValueError, match=f"train.json: {message}"):
        load_annotations(file)


def test_bad_files_are_named(root: Path) -> None:
    file = write_annotations(root, {"a": 1})
    with pytest.raises(ValueError, match="must hold a JSON list of annotations, not dict"):
        load_annotations(file)
    with pytest.raises(ValueError, match="entry 0 must be a JSON object"):
        load_annotations(write_annotations(root, ["x"]))
    file.write_text('[{"scene_id": ')
    with pytest.raises(ValueError, match="is not readable JSON"):
        load_annotations(file)
    with pytest.raises(ValueError, match="does not exist"):
        load_annotations(root / "none.json")


def test_tokens_may_be_missing_and_ids_may_be_numbers(root: Path) -> None:
    item = {**entry(), "object_id": 4, "ann_id": 2}
    del item["token"]
    assert load_annotations(write_annotations(root, [item]))[0].object_id == 4


def test_a_bad_split_and_too_many_frames_are_errors(root: Path) -> None:
    file = write_annotations(root, [entry()])
    with pytest.raises(ValueError, match="split is 'test'"):
        build_samples(root, file, "test", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fewer than the 9 asked for"):
        build_samples(root, file, "train", 9)
