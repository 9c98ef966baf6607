"""detection/f1 on examples computed by hand, and the strict parser of its answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from w2r2_ds.data.tasks.parsing import AnswerError, parse_objects, parse_world_box
from w2r2_ds.evaluation.protocols.detection import match, score_f1


def cube(x: float, size: float = 1.0) -> np.ndarray:
    return np.array([x, 0, 0, 1, 1, size, 0, 0, 0], dtype=float)


def record(name: str, objects: list[tuple[str, np.ndarray]], answer: str | None) -> dict[str, Any]:
    entries = [{"label": label, "box": box.tolist()} for label, box in objects]
    return {"id": name, "objects": entries, "text": answer}


def text(*objects: tuple[str, np.ndarray], key: str = "box_3d") -> str:
    return json.dumps([{"label": label, key: box.tolist()} for label, box in objects])


def test_scores_computed_by_hand() -> None:
    # IoU of unit cubes shifted by s is (1 - s) / (1 + s): 0.2 -> 2/3, 0.5 -> 1/3, 0.6 -> 1/4.
    first = record(
        "a",
        [("chair", cube(0)), ("chair", cube(5)), ("table", cube(10))],
        text(("Chair ", cube(0.2)), ("chair", cube(5.5)), ("chair", cube(0.6)), ("lamp", cube(10)), key="bbox_3d"),
    )
    second = record("b", [("bed", cube(0)), ("bed", cube(3))], "no idea")
    third = record("c", [("door", cube(0))], text(("door", cube(0, 2.0))))  # exactly a half
    result = score_f1([first, second, third])
    assert (result["objects"], result["predictions"], result["samples"]) == (6, 5, 3)
    assert result["at"]["0.25"] == {"hits": 3, "precision": 3 / 5, "recall": 3 / 6, "F1": 6 / 11}
    assert result["at"]["0.5"] == {"hits": 2, "precision": 2 / 5, "recall": 2 / 6, "F1": 4 / 11}
    assert result["parsed"] == pytest.approx(2 / 3)
    assert result["failures"] == {"it is not exactly one JSON list": 1}
    assert result["items"]["a"]["ious"] == pytest.approx([2 / 3, 1 / 3])


def test_the_best_pair_is_matched_first_and_each_box_once() -> None:
    # The first prediction overlaps both annotations; it is matched with the one that the better pair does not use.
    assert match([cube(0.2), cube(0.25)], [cube(0)]) == pytest.approx([2 / 3])
    assert match([cube(0.3), cube(0)], [cube(0), cube(0.6)]) == pytest.approx([1, 0.7 / 1.3])
    assert match([cube(9)], [cube(0)]) == match([], [cube(0)]) == match([cube(0)], []) == []


def test_scores_without_boxes_are_none() -> None:
    result = score_f1([record("a", [], "[]"), record("b", [], None)])
    assert result["at"]["0.5"] == {"hits": 0, "precision": None, "recall": None, "F1": None}
    assert result["failures"] == {"there is no prediction": 1}
    with pytest.raises(ValueError, match="1 detections appear more than once, the first is 'a'"):
        score_f1([record("a", [], "[]")] * 2)
    with pytest.raises(ValueError, match="no detections"):
        score_f1([])


def test_a_list_is_parsed() -> None:
    for written in (text(("a b", cube(1))), "```json\n[\n\t" + text(("a b", cube(1)))[1:-1] + "\n]```"):
        ((label, box),) = parse_objects(written)
        assert label == "a b" and box.tolist() == cube(1).tolist()
    assert parse_objects("[]") == []


GOOD: dict[str, Any] = {"label": "chair", "box_3d": cube(0).tolist()}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "not exactly one JSON list"),
        (json.dumps(GOOD), "not exactly one JSON list"),
        (json.dumps([GOOD])[:-1], "not exactly one JSON list"),
        (json.dumps([GOOD | {"frame": 1}]), "keys of an entry"),
        (json.dumps([GOOD | {"bbox_3d": cube(0).tolist()}]), "keys of an entry"),
        (json.dumps([[1]]), "keys of an entry"),
        (json.dumps([GOOD | {"label": 3}]), "label is not a text"),
        (json.dumps([GOOD | {"box_3d": [1] * 8}]), "9 numbers"),
        (json.dumps([GOOD | {"box_3d": cube(0, -1.0).tolist()}]), "size that is not positive"),
        ('[{"label": "a", "label": "b"}]', "twice"),
        ("[NaN]", "not finite"),
    ],
)
def test_other_texts_raise(written: str, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        parse_objects(written)


def test_a_world_box_is_parsed() -> None:
    assert parse_world_box(" -1.0,0, .5,1,2e0,1.5\n").tolist() == [0, 1, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "six numbers"),
        ("1,2,3,4,5", "six numbers"),
        ("[0,0,0,1,1,1]", "six numbers"),
        ("0,0,0,1,1,nan", "six numbers"),
        ("0,0,0,1,1,1_0", "six numbers"),
        ("0,0,0,1,1,1e999", "not finite"),
        ("0,0,0,1,1,0", "not above"),
        ("0,0,0,1,-1,1", "not above"),
    ],
)
def test_other_texts_are_no_world_box(written: str, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        parse_world_box(written)
