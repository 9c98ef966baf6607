"""ScanRefer's samples in both formats: strings, frames and boxes by hand, and skipped items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hand_scene import SCENE, entry, prepared_items, reasons, write_annotations, write_infos
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.tasks.base import TASKS, AnnotationMismatch
from w2r2_ds.data.tasks.scanrefer import WORLD_QUESTION, answer_text, description_span, question_text, world_answer_text
from w2r2_ds.models.geometry.point_transforms import world_change
from w2r2_ds.types.sample import Sample

CHAIR, TABLE, LAMP = entry(), entry(4, "table", 1, "the table."), entry(3, "lamp", 0, "a hidden lamp.")


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


def test_strings_are_video3dllms() -> None:
    assert question_text("the Chair.", WORLD_QUESTION) == (
        "Localize the object according to the following description.\n"
        "The chair.\n"
        "Output the answer in the format x_min,y_min,z_min,x_max,y_max,z_max"
    )
    assert world_answer_text(np.array([2.0, -5.0, 1.0, 0.8, 0.61, 1.0])) == "1.6,-5.3,0.5,2.4,-4.7,1.5"


def test_world_boxes_with_one_decimal(root: Path) -> None:
    """Prepared, and changed with its world."""
    write_annotations(root, [CHAIR])
    two, one = (prepared_items(root, "scanrefer", format="video3dllm", decimals=each)[0] for each in (2, 1))
    assert (two.answer, two.decimals) == ("1.6,4.7,0.5,2.4,5.3,1.5", 2)
    assert (one.answer, one.decimals) == ("1.6,4.7,0.5,2.4,5.3,1.5", 1)
    third = world_change(1 / 3, (0.0, 0.0, 0.0), 0.0)
    assert TASKS["scanrefer"].change_world(two, third).answer == "0.53,1.57,0.17,0.8,1.77,0.5"
    assert TASKS["scanrefer"].change_world(one, third).answer == "0.5,1.6,0.2,0.8,1.8,0.5"
    flat = np.array([2.0, -5.0, 1.0, 0.04, 0.61, 1.0])
    assert world_answer_text(flat, 1) == "2.0,-5.3,0.5,2.1,-4.7,1.5"  # a side is at least one unit


@pytest.mark.parametrize("template", [None, WORLD_QUESTION])
def test_the_span_is_the_description(template: str | None) -> None:
    more = () if template is None else (template,)
    question = question_text("  the {box} IS red. ", *more)
    begin, end = description_span("  the {box} IS red. ", *more)
    assert question[begin:end] == "the {box} is red."


def test_by_depth_the_answer_has_the_clearest_frame(root: Path) -> None:
    write_annotations(root, [CHAIR, TABLE, LAMP])
    made = prepared_items(root, "scanrefer", count=3, visibility="depth")
    assert reasons(made) == {f"{SCENE}|3|lamp|0": "no_visible_frame"}
    assert [each.id for each in made[:2]] == [f"{SCENE}|0|office_chair|0", f"{SCENE}|4|table|1"]
    first = made[0]
    assert (first.task, first.scene_id, first.kind) == ("scanrefer", SCENE, "grounding")
    assert first.box_format == "camera"
    assert [path.name for path in first.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert first.cam_to_world.shape == (3, 4, 4)
    # By hand: frame 1 is at (1, 3, 1.5), points along y and is level, so a0 + a2 = 0 and a1 = 90 degrees.
    expected = [1.0, 0.5, 2.0, 0.8, 0.6, 1.0, 0.0, 1.57, 0.0]
    assert first.answer == f'```json\n\t{{"frame": 1, "bbox_3d": {expected}}}\n```'


def test_the_answer_with_the_box_nearest_to_the_heading(root: Path) -> None:
    """The camera faces world +y: the box's x axis is turned there, and the sides are exchanged."""
    write_annotations(root, [CHAIR])
    (made,) = prepared_items(root, "scanrefer", count=3, visibility="depth", box_angles="nearest_heading")
    expected = [1.0, 0.5, 2.0, 0.6, 0.8, 1.0, 1.57, 0.0, -1.57]
    assert made.answer == f'```json\n\t{{"frame": 1, "bbox_3d": {expected}}}\n```'
    (plain,) = prepared_items(root, "scanrefer", count=3, visibility="depth")
    np.testing.assert_array_equal(made.target.box, plain.target.box)
    assert made.question == plain.question and made.frames == plain.frames


def test_the_target_has_the_fields_for_scoring(root: Path) -> None:
    write_annotations(root, [CHAIR, TABLE, LAMP])
    target = prepared_items(root, "scanrefer", visibility="depth")[0].target
    np.testing.assert_array_equal(target.box, [2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 0.0, 0.0, 0.0])
    assert (target.object_id, target.object_name, target.ann_id) == (0, "office chair", "0")
    # Chair, table and lamp are different classes of ScanNet's 18; the test's label table maps all to NYU40 id 5.
    assert (target.group, target.group_nyu40, target.scannet_class) == ("unique", "multiple", 2)
    assert target.described is None


def test_by_infos_an_instance_must_match_and_be_visible(root: Path) -> None:
    write_infos(root)
    write_annotations(root, [CHAIR, TABLE, LAMP])
    made = prepared_items(root, "scanrefer")  # frames 0 and 2; only frame 1 shows the table
    assert reasons(made) == {f"{SCENE}|4|table|1": "no_visible_frame", f"{SCENE}|3|lamp|0": "no_instance_match"}
    assert made[0].answer.startswith('```json\n\t{"frame": 0, "bbox_3d": [1.0, 0.5, 3.0, 0.8, 0.6, 1.0, ')
    assert [each.location.split(": ")[1] for each in made[1:]] == ["entry 2", "entry 3"]
    whole = prepared_items(root, "scanrefer", count=3)
    assert whole[1].answer.startswith('```json\n\t{"frame": 1, "bbox_3d": [-1.0, 0.5, 2.0, 0.6, 0.6, 0.6, ')


def test_every_roll_is_a_sample_with_its_own_frames(root: Path) -> None:
    write_infos(root)
    write_annotations(root, [TABLE] * 1 + [entry(4, "table", n) for n in range(2, 8)])
    made = prepared_items(root, "scanrefer", frames=FrameOptions("vgllm", 2), rolls=2)
    assert [each.id for each in made][:3] == [f"{SCENE}|4|table|1#0", f"{SCENE}|4|table|1#1", f"{SCENE}|4|table|2#0"]
    assert len(made) == 14 and all(isinstance(each, Sample) for each in made)
    chosen = {tuple(path.stem for path in each.frames) for each in made}
    assert chosen == {("00000", "00001"), ("00001", "00002")}, "every draw that shows the table: rolled, stride 1"
    for each in made:
        assert f'"frame": {[path.stem for path in each.frames].index("00001")},' in each.answer
    once = prepared_items(root, "scanrefer", frames=FrameOptions("vgllm", 2))
    assert once[0].id == f"{SCENE}|4|table|1", "no suffix with one roll"


def test_validation_keeps_all_descriptions_with_one_roll(root: Path) -> None:
    write_infos(root, "val")
    write_annotations(root, [LAMP, CHAIR, TABLE], "val")
    made = prepared_items(root, "scanrefer", "val")
    assert [each.id for each in made] == [f"{SCENE}|3|lamp|0", f"{SCENE}|0|office_chair|0", f"{SCENE}|4|table|1"]
    assert [bool(each.answer) for each in made] == [False, True, False]


def test_the_world_format_needs_neither_infos_nor_visibility(root: Path) -> None:
    write_annotations(root, [CHAIR, LAMP])
    chair, lamp = prepared_items(root, "scanrefer", format="video3dllm")
    assert (chair.answer, chair.kind, chair.box_format) == ("1.6,4.7,0.5,2.4,5.3,1.5", "grounding", "world")
    assert chair.question[slice(*chair.what)] == "The red chair."
    assert lamp.answer == "0.75,7.75,1.25,1.25,8.25,1.75"


def test_all_objects_missing_in_the_scene_are_reported(root: Path) -> None:
    write_annotations(root, [CHAIR, entry(99), entry(98)])
    message = rf"train.json: entry 2: field 'object_id' is 99, .*{SCENE}"
    with pytest.raises(AnnotationMismatch, match=message) as caught:
        prepared_items(root, "scanrefer", visibility="depth")
    assert len(caught.value.messages) == 2


def test_a_scene_missing_in_embodiedscan_raises(root: Path) -> None:
    write_infos(root, scene_ids=(SCENE,))
    write_annotations(root, [{**CHAIR, "scene_id": "scene0007_00"}])
    with pytest.raises(ValueError, match="scene0007_00: EmbodiedScan's infos do not have this scene"):
        prepared_items(root, "scanrefer")


def test_the_other_splits_infos_are_read_too(root: Path) -> None:
    write_infos(root, "val")
    (root / "embodiedscan" / "embodiedscan_infos_val.pkl").rename(root / "embodiedscan" / "kept")
    write_infos(root, "train")
    path = root / "embodiedscan" / "embodiedscan_infos_train.pkl"
    path.write_bytes(path.read_bytes().replace(SCENE.encode(), b"scene0009_00"))
    (root / "embodiedscan" / "kept").rename(root / "embodiedscan" / "embodiedscan_infos_val.pkl")
    write_annotations(root, [CHAIR])
    assert isinstance(prepared_items(root, "scanrefer")[0], Sample)
