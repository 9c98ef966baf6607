"""Questions about synthetic rooms: an independent parser answers every question from the room."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthetic_truth import SCENES, matching_object, matching_objects, rebuild_room
from w2r2_ds.demo.synthetic.questions import GeneratedQuestion, make_questions
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject
from w2r2_ds.demo.synthetic.write import Written

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PATTERNS = {
    "color": r"What (?:color is|is the color of) the (?P<one>[a-z ]+?)(?: (?P<how>nearest to|closest to|farthest from) "
    r"(?P<a>the .+)| between (?P<b>the .+) and (?P<c>the .+))?\?",
    "count": r"How many (?P<many>.+) are (?:there|in the room)\?",
    "nearest": r"What is (?:nearest|closest) to (?P<a>the .+)\?",
    "between": r"What (?:stands|is) between (?P<a>the .+) and (?P<b>the .+)\?",
    "larger": r"Which (?:is larger|one is bigger), (?P<a>the .+) or (?P<b>the .+)\?",
    "side": r"Facing (?P<a>the .+), what comes next to its (?P<side>left|right) along the wall\?|What comes next along "
    r"the wall to the (?P<other>left|right) of (?P<b>the .+) when you face it\?",
    "where": r"Where (?:is|can you find) (?P<a>the .+)\?",
}
HANGING, PARTLY_COLORED = ("window", "picture"), ("window", "door", "bed", "picture", "plant")


def read(text: str) -> tuple[str, dict[str, str]]:
    """Kind of a question, and the phrases in it."""
    found = [(kind, match) for kind, pattern in PATTERNS.items() if (match := re.fullmatch(pattern, text))]
    assert len(found) == 1, text
    kind, match = found[0]
    return kind, {name: words for name, words in match.groupdict().items() if words}


def apart(one: RoomObject, other: RoomObject) -> float:
    """Distance between two centres on the floor plan."""
    return float(np.linalg.norm(one.box[:2] - other.box[:2]))


def detour(o: RoomObject, ends: Sequence[RoomObject]) -> float:
    return sum(apart(o, end) for end in ends)


def others(room: Room, *excluded: RoomObject) -> list[RoomObject]:
    return [o for o in room.objects if all(o is not other for other in excluded)]


def next_along_wall(room: Room, anchor: RoomObject, side: str) -> RoomObject:
    """The next object along the wall, for a viewer in front of the anchor who faces it.

    The anchor's wall is the one at its back, which its box touches; other objects at that wall touch it too.
    """
    half = np.array(room.size) / 2
    axis, sign = back(anchor)
    touching = [o for o in room.objects if half[axis] - sign * o.box[axis] - o.box[3 + axis] / 2 < 0.02]
    assert any(o is anchor for o in touching)
    forward = np.zeros(2)
    forward[axis] = sign
    viewer = anchor.box[:2] - 2.0 * forward
    turn = 1.0 if side == "left" else -1.0

    def to_the_side(o: RoomObject) -> float:
        offset = o.box[:2] - viewer
        return turn * float(forward[0] * offset[1] - forward[1] * offset[0])

    return min((o for o in touching if o is not anchor and to_the_side(o) > 0), key=to_the_side)


def back(o: RoomObject) -> tuple[int, float]:
    """Axis and sign of the direction from an object to its wall."""
    direction = np.round([-np.sin(o.oriented[6]), np.cos(o.oriented[6])], 6)
    axis = int(np.argmax(np.abs(direction)))
    return axis, float(direction[axis])


def answer(room: Room, text: str) -> tuple[str, set[str], set[int]]:
    """Kind, accepted answers and ids of the objects in the answer."""
    kind, words = read(text)
    if kind == "color":
        candidates = matching_objects(room.objects, words["one"])
        if "how" in words:
            anchor = matching_object(room.objects, words["a"])
            order = sorted(candidates, key=lambda o: apart(o, anchor))
            found = order[-1 if words["how"] == "farthest from" else 0]
        elif "b" in words:
            ends = [matching_object(room.objects, words[key]) for key in "bc"]
            found = min(candidates, key=lambda o: detour(o, ends))
        else:
            found = matching_object(room.objects, words["one"])
        assert found.name not in PARTLY_COLORED
        return kind, {found.color}, {found.object_id}
    if kind == "count":
        counted = matching_objects(room.objects, words["many"])
        word = next(word for word, number in NUMBERS.items() if number == len(counted))
        return kind, {str(len(counted)), word}, {o.object_id for o in counted}
    if kind == "where":
        target = matching_object(room.objects, words["a"])
        near = min(others(room, target), key=lambda o: apart(o, target))
        phrases = [phrase for phrase in (f"the {near.name}", f"the {near.color} {near.name}") if fits_one(room, phrase)]
        assert near.name not in HANGING
        assert apart(target, near) < 3.0
        return kind, {f"{how} {phrase}" for how in ("next to", "beside") for phrase in phrases}, {target.object_id}
    if kind == "larger":
        pair = [matching_object(room.objects, words[key]) for key in "ab"]
        found = max(pair, key=lambda o: float(o.oriented[3:6].prod()))
        phrase = words["a"] if found is pair[0] else words["b"]
        return kind, {phrase, phrase.removeprefix("the ")}, {found.object_id}
    if kind == "nearest":
        anchor = matching_object(room.objects, words["a"])
        found = min(others(room, anchor), key=lambda o: apart(o, anchor))
    elif kind == "between":
        ends = [matching_object(room.objects, words[key]) for key in "ab"]
        found = min(others(room, *ends), key=lambda o: detour(o, ends))
        assert found.name not in HANGING
    else:
        anchor = matching_object(room.objects, words.get("a") or words["b"])
        found = next_along_wall(room, anchor, words.get("side") or words["other"])
    accepted = {found.name} if found.name in PARTLY_COLORED else {found.name, f"{found.color} {found.name}"}
    return kind, accepted, {found.object_id}


def fits_one(room: Room, phrase: str) -> bool:
    return len(matching_objects(room.objects, phrase)) == 1


def mentioned(room: Room, text: str) -> set[int]:
    """Ids of the objects that the phrases of a question refer to."""
    _, words = read(text)
    return {matching_object(room.objects, words[key]).object_id for key in "abc" if key in words}


@pytest.fixture(scope="module")
def generated(many_rooms: list[Room]) -> list[tuple[Room, list[GeneratedQuestion]]]:
    """Rooms with their questions; all objects are visible."""
    result = []
    for seed, room in enumerate(many_rooms):
        rng = np.random.default_rng(seed)
        result.append((room, make_questions(rng, room.objects, range(len(room.objects)), int(rng.integers(6, 11)))))
    return result


def check(room: Room, text: str, answers: Sequence[str], object_ids: Collection[int]) -> str:
    kind, accepted, about = answer(room, text)
    assert 1 <= len(answers) <= 2, text
    assert set(answers) <= accepted, (text, answers, accepted)
    assert set(object_ids) == about, text
    assert all(reference == reference.lower().strip() for reference in answers)
    return kind


def test_answers_are_true(generated: list[tuple[Room, list[GeneratedQuestion]]]) -> None:
    for room, questions in generated:
        assert 6 <= len(questions) <= 10
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            assert check(room, question.text, question.answers, question.object_ids) == question.kind


def test_no_answer_is_frequent(generated: list[tuple[Room, list[GeneratedQuestion]]]) -> None:
    """A guess without the image is right for less than half of each kind of question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    first = 0
    for _, questions in generated:
        for question in questions:
            answers[question.kind][question.answers[0]] += 1
            if question.kind == "larger":
                first += question.text.index(question.answers[0]) < question.text.index(" or ")
    assert set(answers) == set(PATTERNS)
    for kind, counter in answers.items():
        assert counter.total() >= 8, kind
        assert counter.most_common(1)[0][1] / counter.total() < 0.5, (kind, counter)
    assert 0.35 < first / answers["larger"].total() < 0.65


def test_invisible_objects_are_neither_referred_to_nor_counted(many_rooms: list[Room]) -> None:
    """Half of the objects are invisible; answers must still be true for the whole room."""
    kinds: Counter[str] = Counter()
    for seed, room in enumerate(many_rooms):
        rng = np.random.default_rng(seed)
        visible = {int(i) for i in rng.permutation(len(room.objects))[::2]}
        for question in make_questions(rng, room.objects, visible, 8):
            kinds[check(room, question.text, question.answers, question.object_ids)] += 1
            assert set(question.object_ids) | mentioned(room, question.text) <= visible
    assert set(kinds) == set(PATTERNS)


def test_there_are_no_questions_about_ambiguous_relations() -> None:
    """Two candidates differ by less than 0.4 m in distance, or by 10 % in size."""

    def at(object_id: int, name: str, x: float, size: float = 0.4) -> RoomObject:
        box = np.array([x, 0.0, 0.5, size, 0.4, 1.0])
        return RoomObject(object_id, name, "red", box, np.concatenate([box, np.zeros(3)]))

    def kinds_about_the_table(*objects: RoomObject) -> set[str]:
        questions = make_questions(np.random.default_rng(0), objects, range(len(objects)), 50)
        return {read(question.text)[0] for question in questions if "the table" in question.text}

    close = kinds_about_the_table(at(0, "table", 0.0), at(1, "chair", 0.9), at(2, "stool", -1.2, 0.44))
    assert close == {"color"}
    clear = kinds_about_the_table(at(0, "table", 0.0), at(1, "chair", 0.9), at(2, "stool", -1.7, 0.8))
    assert clear == {"color", "nearest", "where", "larger"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_file_has_the_format_of_scanqa(rooms: Written, split: str) -> None:
    entries = json.loads((rooms.root / "ScanQA" / f"ScanQA_v1.0_{split}.json").read_text())
    assert len(entries) == rooms.manifest["counts"][f"{split}_questions"]
    fields = {"scene_id", "question_id", "question", "answers", "object_ids", "object_names"}
    assert all(set(entry) == fields for entry in entries)
    assert {entry["scene_id"] for entry in entries} == set(SCENES[:2] if split == "train" else SCENES[2:])
    for name in {entry["scene_id"] for entry in entries}:
        room, mine = rebuild_room(rooms.root, name), [entry for entry in entries if entry["scene_id"] == name]
        assert 6 <= len(mine) <= 10
        assert [entry["question_id"] for entry in mine] == [f"{split}-{name[:9]}-{i}" for i in range(len(mine))]
        visible = visible_objects(rooms.root, split, name)
        for entry in mine:
            check(room, entry["question"], entry["answers"], entry["object_ids"])
            assert entry["object_names"] == [room.objects[i].name.replace(" ", "_") for i in entry["object_ids"]]
            assert set(entry["object_ids"]) | mentioned(room, entry["question"]) <= visible


def visible_objects(root: Path, split: str, name: str) -> set[int]:
    content: dict[str, Any] = np.load(root / "embodiedscan" / f"embodiedscan_infos_{split}.pkl", allow_pickle=True)
    (info,) = [info for info in content["data_list"] if info["sample_idx"] == f"scannet/{name}"]
    return {i for image in info["images"] for i in image["visible_instance_ids"]}
