"""Grounding answers: accepted forms, and the reason for every other text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.parsing import AnswerError, Grounding, WorldGrounding, parse_grounding

POSES = np.stack([np.eye(4), np.array([[0, -1, 0, 2], [1, 0, 0, -1], [0, 0, 1, 0.5], [0, 0, 0, 1.0]])])
NUMBERS = [-0.63, -0.83, 2.43, 3.0, 0.59, 2.35, -2.32, 1.18, 3.05]
PLAIN = json.dumps({"frame": 12, "bbox_3d": NUMBERS})


def with_box(numbers: object) -> str:
    """An answer with another box, written as text so that it may be invalid JSON."""
    return PLAIN.replace(json.dumps(NUMBERS), str(numbers))


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"  {PLAIN}\n",
        f"```json\n\t{PLAIN}\n```",
        f"```\n{PLAIN}\n```\n",
        f"```json {PLAIN}```",
        "```json\n" + json.dumps(json.loads(PLAIN), indent=2) + "\n```",
        json.dumps({"bbox_3d": NUMBERS, "frame": 12}),
    ],
)
def test_accepted_answers(text: str) -> None:
    answer = parse_grounding(text, 24)
    assert answer.frame == 12
    assert answer.box.dtype == np.float64
    np.testing.assert_array_equal(answer.box, NUMBERS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "one JSON object"),
        ("I cannot find it.", "one JSON object"),
        (f"Here it is: {PLAIN}", "one JSON object"),
        (f"{PLAIN}\n{PLAIN}", "one JSON object"),
        (f"```json\n{PLAIN}\n```\nDone.", "one JSON object"),
        (f"```json\n{PLAIN}", "one JSON object"),
        (f"```python\n{PLAIN}\n```", "one JSON object"),
        (f"[{PLAIN}]", "one JSON object"),
        (PLAIN.replace('"', "'"), "one JSON object"),
        (PLAIN[:-1], "one JSON object"),
        ("[" * 100_000, "one JSON object"),
        ("__import__('os').getcwd() or " + PLAIN, "one JSON object"),
        (with_box("[" + "9" * 5000 + "]"), "one JSON object"),
        (PLAIN.replace("frame", "Frame"), "keys"),
        (PLAIN.replace("bbox_3d", "box_3d"), "keys"),
        (PLAIN[:-1] + ', "label": "chair"}', "keys"),
        (PLAIN[:-1] + ', "frame": 3}', "twice"),
        (PLAIN.replace("12", "12.0"), "frame is not an integer"),
        (PLAIN.replace("12", '"12"'), "frame is not an integer"),
        (PLAIN.replace("12", "true"), "frame is not an integer"),
        (PLAIN.replace("12", "-1"), "out of range"),
        (PLAIN.replace("12", "24"), "out of range"),
        (with_box(NUMBERS[:8]), "list of 9"),
        (with_box([*NUMBERS, 1.0]), "list of 9"),
        (with_box('"a"'), "list of 9"),
        (with_box("[1, 1, 1, 1, 1, 1, 1, 1, true]"), "list of 9"),
        (with_box('[1, 1, 1, 1, 1, 1, 1, 1, "1"]'), "list of 9"),
        (with_box("[1, 1, 1, 1, 1, 1, 1, 1, [1]]"), "list of 9"),
        (with_box("[1, 1, 1, 1, 1, 1, 1, 1, NaN]"), "not finite"),
        (with_box("[1, 1, 1, 1, 1, 1, 1, 1, -Infinity]"), "not finite"),
        (with_box("[1, 1, 1, 1, 1, 1, 1, 1, 1e400]"), "not finite"),
        (with_box(f"[1, 1, 1, 1, 1, 1, 1, 1, {10**400}]"), "not finite"),
        (with_box("[1, 1, 1, 1, 0, 1, 1, 1, 1]"), "size"),
        (with_box("[1, 1, 1, 1, 1, -2, 1, 1, 1]"), "size"),
    ],
)
def test_rejected_answers(text: str, reason: str) -> None:
    with pytest.raises(AnswerError) as caught:
        parse_grounding(text, 24)
    assert reason in caught.value.reason
    assert caught.value.reason in str(caught.value)


def test_the_world_box_of_an_answer() -> None:
    answer = TASKS.find("scanrefer").parse(with_box([1, 2, 3, 0.5, 0.6, 0.7, 0.1, 0.2, 0.3]).replace("12", "1"), 2)
    assert isinstance(answer, Grounding)
    np.testing.assert_array_equal(answer.world_box(POSES), camera_to_world(answer.box, POSES[1]))
    huge = Grounding(1, np.array([1e308] * 6 + [1.0] * 3))
    assert not np.isfinite(huge.world_box(1e3 * POSES)).all()


def test_a_world_answer_is_parsed_by_the_box_format_of_its_sample() -> None:
    text, task = "-1.5,0.25,0.0,-0.5,0.75,2.0", TASKS.find("scanrefer")
    answer = task.parse(text, 0, "world")
    assert isinstance(answer, WorldGrounding)
    np.testing.assert_array_equal(answer.box, [-1.0, 0.5, 1.0, 1.0, 0.5, 2.0])
    np.testing.assert_array_equal(answer.world_box(np.zeros((0, 4, 4))), [-1.0, 0.5, 1.0, 1.0, 0.5, 2.0, 0, 0, 0])
    with pytest.raises(AnswerError):
        task.parse(text, 32, "camera")
    with pytest.raises(AnswerError):
        task.parse(PLAIN, 32, "world")
