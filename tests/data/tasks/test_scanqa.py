"""ScanQA's samples: strings, ids, references and frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hand_scene import SCENE, prepared_items, question_entry, write_questions
from w2r2_ds.data.sources.scannet import boxes_file
from w2r2_ds.types.sample import Reference


def test_training_has_a_sample_per_answer(root: Path) -> None:
    write_questions(root, [question_entry(), question_entry(1, ["red"])])
    made = prepared_items(root, "scanqa", format="video3dllm")
    ids = ["scanqa_val-scene0000-0_0", "scanqa_val-scene0000-0_1", "scanqa_val-scene0000-1_0"]
    assert [each.id for each in made] == ids
    assert [each.answer for each in made] == ["red", "dark red", "red"]
    first = made[0]
    assert first.question == " What color is the chair? Answer the question simply."
    assert first.question[slice(*first.what)] == "What color is the chair?"
    assert (first.task, first.kind, first.target, first.references) == ("scanqa", "answer", None, ())
    assert [path.name for path in first.frames] == ["00000.jpg", "00002.jpg"]


def test_validation_has_a_sample_per_question(root: Path) -> None:
    write_questions(root, [question_entry()], "val")
    (made,) = prepared_items(root, "scanqa", "val", format="video3dllm")
    assert made.id == "val-scene0000-0"
    assert made.references == (Reference("red"), Reference("dark red"))


def test_the_test_split_has_neither_answers_nor_objects(root: Path) -> None:
    bare = {name: value for name, value in question_entry().items() if name in ("scene_id", "question_id", "question")}
    write_questions(root, [bare], "test_wo_obj")
    (made,) = prepared_items(root, "scanqa", "test_wo_obj", format="video3dllm")
    assert (made.answer, made.references) == ("", ())
    write_questions(root, [bare], "val")
    with pytest.raises(ValueError, match=r"val.json: "):
        prepared_items(root, "scanqa", "val", format="video3dllm")


def test_a_question_needs_no_box(root: Path) -> None:
    write_questions(root, [question_entry(), question_entry(1, objects=(0, 98))], "val")
    boxes_file(root, SCENE).unlink()
    assert len(prepared_items(root, "scanqa", "val", format="video3dllm")) == 2


def test_the_frames_are_those_of_the_other_tasks(root: Path) -> None:
    """A frame with a lost pose is skipped; without pose files, all frames are used."""
    write_questions(root, [question_entry()], "val")
    (made,) = prepared_items(root, "scanqa", "val", count=9, format="video3dllm")
    assert [path.name for path in made.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert made.cam_to_world.shape == (3, 4, 4) and np.isnan(made.cam_to_world).all(), "the samples hold no poses"
    for path in (root / "posed_images" / SCENE).glob("*.txt"):
        path.unlink()
    (made,) = prepared_items(root, "scanqa", "val", count=9, format="video3dllm")
    assert len(made.frames) == 4
