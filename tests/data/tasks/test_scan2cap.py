"""Scan2Cap's samples in both formats: strings and coordinates by hand, proposals and references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hand_scene import CAMERA, SCENE, entry, prepared_items, reasons, write_annotations, write_proposals
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.scan2cap import best_proposal, question_text
from w2r2_ds.models.geometry.point_transforms import world_change
from w2r2_ds.types.sample import Reference

BOX = np.array([2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 0.0, 0.0, 0.0])
ENTRIES = [entry(), entry(4, "table", 0, "the table."), entry(0, "office_chair", 1, "It is RED. very.")]


def test_prompt_and_answer_strings() -> None:
    assert question_text(BOX, CAMERA) == (
        "\nCarefully watch the video and describe the object located at [1.0, 0.5, 3.0] in detail."
    )
    assert question_text(BOX + 0.004) == "Given an object located at [2.0, 5.0, 1.0] , describe the object in detail."


def test_positions_in_the_world_with_one_decimal(root: Path) -> None:
    """Prepared, and changed with its world."""
    write_annotations(root, ENTRIES)
    made = prepared_items(root, "scan2cap", format="video3dllm", decimals=1)[0]
    third = world_change(1 / 3, (0.0, 0.0, 0.0), 0.0)
    changed = TASKS["scan2cap"].change_world(made, third)
    for sample, place in ((made, "[2.0, 5.0, 1.0]"), (changed, "[0.7, 1.7, 0.3]")):
        assert sample.question == f"Given an object located at {place} , describe the object in detail."
        assert sample.decimals == 1


def test_training_has_a_sample_per_description(root: Path) -> None:
    write_annotations(root, ENTRIES)
    made = prepared_items(root, "scan2cap")
    assert [each.id for each in made] == [
        f"{SCENE}|0|office_chair|0",
        f"{SCENE}|4|table|0",
        f"{SCENE}|0|office_chair|1",
    ]
    assert [each.answer for each in made] == ["The red chair.", "The table.", "It is red. very."]
    first = made[0]
    assert first.question.endswith("located at [1.0, 0.5, 3.0] in detail."), "in the first frame's camera"
    assert (first.kind, first.what, first.references) == ("caption", (0, 0), ())
    assert first.target.ann_id == "0"
    np.testing.assert_array_equal(first.target.described, BOX[:6])


def test_validation_has_a_sample_per_object_at_the_best_proposal(root: Path) -> None:
    write_annotations(root, ENTRIES, "val")
    write_proposals(root, [[9, 9, 1, 1, 1, 1], [2.5, 5, 1, 0.8, 0.6, 1], [2.1, 5, 1, 0.8, 0.6, 1], [2, 5, 1, 9, 9, 9]])
    chair, table = prepared_items(root, "scan2cap", "val")
    assert chair.id == f"{SCENE}|0|office_chair"
    assert chair.question.endswith("located at [1.1, 0.5, 3.0] in detail.")
    np.testing.assert_array_equal(chair.target.described, [2.1, 5, 1, 0.8, 0.6, 1])
    np.testing.assert_array_equal(chair.target.box, BOX)
    assert chair.target.ann_id == ""
    assert chair.answer == "The red chair."
    assert chair.references == (
        Reference("The Red Chair.", ("the", "red", "chair.")),
        Reference("It is RED. very.", ("it", "is", "red.", "very.")),
    )
    assert table.id == f"{SCENE}|4|table" and len(table.references) == 1


def test_validation_at_annotated_boxes_needs_no_proposals(root: Path) -> None:
    write_annotations(root, ENTRIES, "val")
    made = prepared_items(root, "scan2cap", "val", boxes="annotated", format="video3dllm")
    assert made[0].question == "Given an object located at [2.0, 5.0, 1.0] , describe the object in detail."


def test_an_object_with_two_names_gives_two_samples(root: Path) -> None:
    write_annotations(root, [entry(), entry(0, "chair", 1)], "val")
    made = prepared_items(root, "scan2cap", "val", boxes="annotated")
    assert [each.id for each in made] == [f"{SCENE}|0|office_chair", f"{SCENE}|0|chair"], "as Scan2Cap counts them"


def test_all_objects_of_a_scene_without_proposals_are_skipped(root: Path) -> None:
    write_annotations(root, ENTRIES, "val")
    write_proposals(root, [])
    expected = {f"{SCENE}|0|office_chair": "no_proposal", f"{SCENE}|4|table": "no_proposal"}
    assert reasons(prepared_items(root, "scan2cap", "val")) == expected
    (root / "proposals" / "scannet_val_pred_box.json").write_text('{"scene0009_00": [[0, 0, 0, 1, 1, 1]]}')
    with pytest.raises(ValueError, match=f"{SCENE}: the proposals do not have this scene"):
        prepared_items(root, "scan2cap", "val")


def test_best_proposal_by_hand() -> None:
    proposals = np.array([[9.0, 9, 9, 1, 1, 1], [0.5, 0, 0, 1, 1, 1], [0.4, 0, 0, 1, 1, 1], [0, 0, 0, 2, 2, 2]])
    unit = np.array([0.0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(best_proposal(proposals, unit), proposals[2])  # .429 against .333 and .125
    np.testing.assert_array_equal(best_proposal(proposals[:1], unit), proposals[0])  # none overlaps: the first


@pytest.mark.parametrize(
    ("task", "format"), [("scan2cap", "vgllm"), ("scan2cap", "video3dllm"), ("scanrefer", "video3dllm")]
)
def test_a_training_sample_gets_a_set_that_shows_its_object(root: Path, task: str, format: str) -> None:
    """Three sets of one frame each: the third camera is turned away, and no frame shows the lamp."""
    chairs = [entry(0, "office_chair", number, f"chair {number}.") for number in range(12)]
    write_annotations(root, [*chairs, entry(3, "lamp", 0, "a hidden lamp.")])
    sets = FrameOptions("scene_sets", 1, sets=3)
    made = prepared_items(root, task, frames=sets, visibility="depth", format=format)
    assert reasons(made) == {f"{SCENE}|3|lamp|0": "no_visible_frame"}
    shown = {path.name for each in made[:-1] for path in each.frames}
    assert shown == {"00000.jpg", "00001.jpg"}, "both sets that show it, chosen by a hash"
    if task == "scanrefer":
        write_annotations(root, [*chairs, entry(3, "lamp", 0, "a hidden lamp.")], "val")
        kept = prepared_items(root, task, "val", frames=sets, visibility="depth", format=format)
        assert len(kept) == 13 and not reasons(kept), "validation keeps all"
