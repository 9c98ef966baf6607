"""Phrases of colour and class: unambiguous, one per object; and data sets with chosen sentences and questions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthetic_truth import matching_objects
from w2r2_ds.commands import prepare
from w2r2_ds.demo.synthetic.options import Options
from w2r2_ds.demo.synthetic.phrases import phrases
from w2r2_ds.demo.synthetic.questions import make_questions
from w2r2_ds.demo.synthetic.rooms import Room


def test_phrases_identify_every_object_that_colour_and_class_identify(many_rooms: list[Room]) -> None:
    alone = with_color = 0
    for seed, room in enumerate(many_rooms):
        visible = range(0, len(room.objects), 2)
        found = phrases(np.random.default_rng(seed), room.objects, visible)
        names, looks = Counter(o.name for o in room.objects), Counter((o.name, o.color) for o in room.objects)
        expected = {o.object_id for o in room.objects if looks[o.name, o.color] == 1 and o.object_id in visible}
        assert sorted(sentence.object_id for sentence in found) == sorted(expected)
        for sentence in found:
            (o,) = matching_objects(room.objects, sentence.text.removeprefix("the ").removesuffix("."))
            assert (o.object_id, o.name) == (sentence.object_id, sentence.name)
            assert sentence.color in (None, o.color) and sentence.relation is None and sentence.anchors == ()
            if names[o.name] == 1:
                alone += sentence.color is None
                with_color += sentence.color is not None
            else:
                assert sentence.color == o.color
    assert alone / (alone + with_color) == pytest.approx(0.3, abs=0.1)  # three standard errors
    assert phrases(np.random.default_rng(0), many_rooms[0].objects, ()) == []


def test_questions_of_chosen_kinds(many_rooms: list[Room]) -> None:
    for room in many_rooms[:5]:
        objects, everything = room.objects, range(len(room.objects))
        for kinds in (("unique_color",), ("count", "larger")):
            questions = make_questions(np.random.default_rng(0), objects, everything, 10, kinds=kinds)
            assert {question.kind for question in questions} == set(kinds)
        for question in make_questions(np.random.default_rng(0), objects, everything, 10, kinds=("unique_color",)):
            (target,) = question.object_ids
            assert question.answers == (objects[target].color,)
            assert sum(o.name == objects[target].name for o in objects) == 1


def test_a_data_set_of_phrases_and_colours_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["synthetic", "--out", str(tmp_path / "data"), "--train_scenes", "1", "--val_scenes", "1", "--workers", "1"]
    words += ["--image_size", "[64,48]", "--frames_per_scene", "6", "--sentences", "phrases"]
    words += ["--world_frame", "corner", "--questions", "[unique_color]"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    assert prepare.main() == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    chosen = {"sentences": "phrases", "world_frame": "corner", "questions": ["unique_color"]}
    assert {name: manifest["options"][name] for name in chosen} == chosen
    entries = json.loads((tmp_path / "data/ScanRefer/ScanRefer_filtered_val.json").read_text())
    assert entries and all(len(entry["token"]) <= 5 for entry in entries)  # the, colour, up to two words, full stop
    assert len({entry["object_id"] for entry in entries}) == len(entries)
    questions = json.loads((tmp_path / "data/ScanQA/ScanQA_v1.0_val.json").read_text())
    assert questions and all("color" in entry["question"] for entry in questions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentences": "words"}, "sentences is 'words'"),
        ({"world_frame": "wall"}, "world_frame is 'wall'"),
        ({"questions": ()}, "questions is "),
        ({"questions": ("color", "colour")}, "questions is .*unique_color"),
        ({"questions": ("count", "count")}, "questions is "),
        ({"questions": ("color", "unique_color")}, "questions has color and unique_color"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(0, 1, 1, (64, 48), 4, **options)
