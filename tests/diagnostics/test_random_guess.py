"""Random guesses: labels of other scenes, in a valid format, seeded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hand_records import BOX, camera_answer, caption, grounding, in_world, question
from w2r2_ds.data.tasks.parsing import parse_grounding
from w2r2_ds.diagnostics.random_guess import most_frequent, random_guesses, read_labels
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.types.sample import Sample


def room(number: int, frame: int = 0, frames: int = 2) -> Sample:
    """A grounding sample with its label."""
    sample = grounding(scene=f"scene{number:04d}_00", number=number)
    sample = replace(sample, frames=sample.frames[:1] * frames, cam_to_world=sample.cam_to_world[[0] * frames])
    return replace(sample, answer=camera_answer(sample, frame))


def test_a_guess_is_the_label_of_another_scene() -> None:
    samples = [room(number) for number in range(4) for _ in range(2)]
    samples = [replace(sample, id=f"{sample.id}-{index}") for index, sample in enumerate(samples)]
    samples = [
        replace(each, answer=each.answer.replace("}", f"{' ' * number}}}")) for number, each in enumerate(samples)
    ]
    records = [record_of(sample, None) for sample in samples]
    scene_of = {sample.answer: sample.scene_id for sample in samples}
    draws = random_guesses(records, read_labels(samples), 200, 0)
    assert len(draws) == 200
    for guesses in draws:
        assert [guess["id"] for guess in guesses] == [record["id"] for record in records]
        assert all(scene_of[guess["text"]] != guess["scene_id"] for guess in guesses)
    drawn = {guess["text"] for guesses in draws for guess in guesses if guess["scene_id"] == "scene0000_00"}
    assert drawn == {text for text, scene in scene_of.items() if scene != "scene0000_00"}, "every other label is drawn"
    assert random_guesses(records, read_labels(samples), 200, 0) == draws
    assert random_guesses(records, read_labels(samples), 200, 1) != draws


def test_a_guess_names_a_frame_of_the_sample() -> None:
    labels = read_labels([room(1, frame=7, frames=8), room(2, frame=1)])
    (guesses,) = random_guesses([record_of(room(3), None)], labels, 1, 0)
    assert parse_grounding(guesses[0]["text"], 2).frame == 1
    with pytest.raises(ValueError, match="scene0003_00"):
        random_guesses([record_of(room(3), None)], labels[:1], 1, 0)


def test_labels_of_another_format_are_not_drawn() -> None:
    world = replace(in_world(grounding(scene="scene0009_00")), answer="1,2,3,4,5,6")
    record = record_of(in_world(grounding(scene="scene0008_00")), None)
    ((guess,),) = random_guesses([record], read_labels([room(1), world]), 1, 0)
    assert guess["text"] == "1,2,3,4,5,6"
    with pytest.raises(ValueError, match="answer format"):
        random_guesses([record], read_labels([room(1)]), 1, 0)


def test_boxes_of_other_projects_get_the_box_of_another_target() -> None:
    record = {**record_of(grounding(scene="scene0008_00"), "x"), "form": "box", "box": None}
    ((guess,),) = random_guesses([record], read_labels([room(1)]), 1, 0)
    assert guess["box"] == BOX[:6].tolist()
    assert json.dumps(guess)


def test_samples_without_label_are_skipped() -> None:
    assert read_labels([grounding()]) == []  # its object is in no frame
    with pytest.raises(ValueError, match="another scene"):
        random_guesses([record_of(grounding(), None)], [], 1, 0)


def test_a_label_that_cannot_be_parsed_raises() -> None:
    with pytest.raises(ValueError, match="scene0001_00"):
        read_labels([replace(room(1), answer="no box")])


def test_the_most_frequent_label() -> None:
    answers = ["two", "red", "two", "red", "brown"]
    labels = read_labels([replace(question(number), answer=text) for number, text in enumerate(answers)])
    assert most_frequent(labels) == "red"
    assert most_frequent(read_labels([replace(caption(number), answer=f"a {number}") for number in range(3)])) is None
    assert most_frequent([]) is None
