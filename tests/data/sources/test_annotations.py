"""Annotation files of ScanRefer and ScanQA; errors name every invalid entry and field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hand_scene import entry
from w2r2_ds.data.sources.annotations import read_scanqa, read_scanrefer


def written(folder: Path, entries: object) -> Path:
    path = folder / "annotations.json"
    assert isinstance(entries, list)
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in entries) + "\n]")
    return path


def question(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "scene_id": "scene0000_00",
        "question_id": f"train-scene0000-{number}",
        "question": "What is it?",
        "answers": ["brown", "dark brown"],
        "object_ids": [8, 9],
        "object_names": ["table"],
        **changes,
    }


def test_reads_a_description(tmp_path: Path) -> None:
    path = written(
        tmp_path, [entry(39, "office_chair", 2, "The Red Chair."), {**entry(4), "object_id": 4, "ann_id": 7}]
    )
    first, second = read_scanrefer(path)
    assert (first.scene_id, first.object_id, first.object_name, first.ann_id) == (
        "scene0000_00",
        39,
        "office_chair",
        "2",
    )
    assert (first.text, first.words) == ("The Red Chair.", ("the", "red", "chair."))
    assert first.location == f"{path}: entry 1"
    assert first.key == "scene0000_00|39|office_chair|2"
    assert (second.object_id, second.ann_id) == (4, "7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"description": "  "}, "field 'description'"),
        ({"description": None}, "field 'description'"),
        ({"object_id": "a"}, "field 'object_id'"),
        ({"object_name": ""}, "field 'object_name'"),
        ({"scene_id": "../up"}, "field 'scene_id'"),
        ({"ann_id": [0]}, "field 'ann_id'"),
        ({"token": "the chair"}, "field 'token'"),
        ({"object_name": ""}, "field 'object_name'"),
        ({"token": [1]}, "field 'token'"),
        ({"ann_id": "0"}, "field scene_id, object_id and ann_id repeats entry 1"),
        ({"ann_id": "00", "object_name": "other"}, "field scene_id, object_id and ann_id repeats entry 1"),
    ],
)
def test_an_invalid_description_raises_with_its_entry(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, [entry(), {**entry(ann_id=1), **change}])
    with pytest.raises(ValueError, match=re.escape(f"{path}: entry 2: {message}")):
        read_scanrefer(path)


@pytest.mark.parametrize(("ann_id", "token"), [(None, None), ("", []), ("missing", "missing")])
def test_ann_id_and_token_are_optional(tmp_path: Path, ann_id: str | None, token: str | list[str] | None) -> None:
    """Without ann_id, the descriptions of an object are numbered in the order of the file."""
    absent = {"ann_id": ann_id, "token": token}
    if ann_id == "missing":
        absent = dict.fromkeys(absent)
    bare = [{**entry(4), **absent}, {**entry(39), **absent}]
    if ann_id == "missing":
        bare = [{name: value for name, value in each.items() if value is not None} for each in bare]
    read = read_scanrefer(written(tmp_path, [*bare, bare[0]]))
    assert [each.key.rpartition("|")[2] for each in read] == ["0", "0", "1"]
    assert {(each.ann_id, each.words) for each in read} == {("", ())}


@pytest.mark.parametrize("field", ["scene_id", "object_id", "object_name", "description"])
def test_other_fields_are_required(tmp_path: Path, field: str) -> None:
    second = entry(ann_id=1)
    del second[field]
    with pytest.raises(ValueError, match=re.escape(f"entry 2: field '{field}'")):
        read_scanrefer(written(tmp_path, [entry(), second]))


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    bad = {**entry(ann_id=1), "description": "", "object_id": "x"}
    path = written(tmp_path, [entry(), bad, 5, entry(ann_id=3)])
    with pytest.raises(ValueError) as caught:
        read_scanrefer(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines[1:]] == [[str(path), f"entry {n}"] for n in (2, 2, 3)]
    with pytest.raises(ValueError) as caught:
        read_scanrefer(written(tmp_path, [{**entry(ann_id=n), "description": ""} for n in range(25)]))
    lines = str(caught.value).splitlines()
    assert "25" in lines[0] and len(lines) == 11


def test_a_missing_or_broken_file_raises_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    for content in ("", "{}", "[{", '[{"a": 1, "a": 2}]', "7"):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_scanrefer(path)


def test_files_without_entries_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations\.json holds an empty list"):
        read_scanrefer(written(tmp_path, []))
    with pytest.raises(ValueError, match=r"none\.json does not exist.*ScanQA"):
        read_scanqa(tmp_path / "none.json")


def test_reads_a_question(tmp_path: Path) -> None:
    path = written(tmp_path, [question()])
    (first,) = read_scanqa(path)
    assert (first.scene_id, first.question_id, first.text) == ("scene0000_00", "train-scene0000-0", "What is it?")
    assert first.answers == ("brown", "dark brown")
    assert first.location == f"{path}: entry 1"


def test_the_test_splits_have_no_answers(tmp_path: Path) -> None:
    entries = [question(0), question(1)]
    entries[0]["answers"] = []
    del entries[1]["answers"]
    path = written(tmp_path, entries)
    assert [each.answers for each in read_scanqa(path, answers_needed=False)] == [(), ()]
    with pytest.raises(ValueError, match="entry 1: field 'answers'"):
        read_scanqa(path)


@pytest.mark.parametrize("objects", [{}, {"object_ids": None, "object_names": None}, {"object_ids": ["x"]}])
def test_the_objects_of_a_question_are_not_read(tmp_path: Path, objects: dict[str, Any]) -> None:
    entry = {name: value for name, value in question().items() if not name.startswith("object_")}
    (read,) = read_scanqa(written(tmp_path, [entry | objects]))
    assert read.object_ids == ()


@pytest.mark.parametrize("answers_needed", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ["", "x"]}, "field 'answers[0]'"),
        ({"answers": "brown"}, "field 'answers'"),
        ({"question": " "}, "field 'question'"),
        ({"question_id": "train-scene0000-0"}, "field question_id repeats entry 1"),
        ({"question_id": 4}, "field 'question_id'"),
        ({"scene_id": "a/b"}, "field 'scene_id'"),
    ],
)
def test_an_invalid_question_raises_with_its_entry(
    tmp_path: Path, answers_needed: bool, change: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, [question(), question(1, **change)])
    with pytest.raises(ValueError, match=re.escape(f"{path}: entry 2: {message}")):
        read_scanqa(path, answers_needed)


@pytest.mark.parametrize("empty", [True, False])
def test_an_entry_without_answers_is_named(tmp_path: Path, empty: bool) -> None:
    second = question(1, answers=[])
    if not empty:
        del second["answers"]
    with pytest.raises(ValueError, match=re.escape("entry 2: field 'answers'")):
        read_scanqa(written(tmp_path, [question(), second]))


def test_reads_the_golden_files() -> None:
    folder = Path(__file__).parents[2] / "golden" / "metrics"
    for name, read in (("scanrefer.annotations", read_scanrefer), ("scanqa.questions", read_scanqa)):
        raw = json.loads((folder / f"{name}.json").read_text())
        assert len(read(folder / f"{name}.json")) == len(raw) > 0
