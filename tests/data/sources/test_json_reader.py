"""Lists in JSON: where an entry begins, and what is said of files that are broken."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from w2r2_ds.data.sources.entries import Problems, read_entries
from w2r2_ds.data.sources.json_reader import read_document


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_entries(path, "a list")
    return str(caught.value)


def test_the_line_is_that_where_an_entry_begins(tmp_path: Path) -> None:
    content = '[\n  {\n    "a": "x\\ny"\n  },\n\n  {"a": "1"}, {"a": 2},\r\n{"a": ["b"]}]\n'
    path = written(tmp_path, content)
    entries = read_entries(path, "a list")
    places = ["line 2 (entry 1)", "line 6 (entry 2)", "line 6 (entry 3)", "line 7 (entry 4)"]
    assert [entry.where for entry in entries] == [f"{path}: {place}" for place in places]
    assert entries[0].text("a") == "x\ny"
    assert (entries[1].integer("a"), entries[2].integer("a")) == (1, 2)
    assert entries[3].texts("a") == ("b",)
    assert [e.where for e in read_entries(written(tmp_path, "\ufeff[{}]"), "a list")] == [f"{path}: line 1 (entry 1)"]
    assert read_entries(written(tmp_path, " [ ] "), "a list") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, but must hold a JSON list; it must be a list"),
        ("\n {}", "begins with '{}', but must hold a JSON list"),
        ('[{"a": 1}, {"a": "tr', ": line 1 (entry 2): the file ends in the middle of this; it is truncated"),
        ('[{"a": 1},\n{"a": ', ": line 2 (entry 2): the file ends in the middle of this"),
        ('[{"a": 1}\n', ": the file ends after line 1 (entry 1); it is truncated"),
        ('[{"a": 1},', ": line 1 (entry 2): the file ends in the middle of this"),
        ("[", ": line 1 (entry 1): the file ends in the middle of this"),
        ('[{"a": 1},\n]', ": line 2, column 1: no JSON (Expecting value)"),
        ('[{"a": 1}\n{"a": 2}]', ": line 2: unexpected '{\"a\": 2}]' after line 1 (entry 1)"),
        ('[{"a": 1}]\n x', ": line 2: unexpected 'x' after the end"),
        ('[{"a": \n nope}]', ": line 2, column 2: no JSON (Expecting value)"),
        ('[{"a": 1, "b": 2, "a": 3}]', ": line 1 (entry 1): field 'a' is there twice"),
        ("[" * 100_000, ": line 1 (entry 1): cannot be decoded (maximum recursion"),
        ('[{"a": ' + "9" * 5000 + "}]", ": line 1 (entry 1): cannot be decoded (Exceeds the limit"),
        (b'[{"a": 1},\n{"a": "caf\xe9"}]', ": line 2: byte 21 of the file (0xe9) is not UTF-8"),
        (b'\xef\xbb\xbf[{"a": 1},\n{"a": "caf\xe9"}]', ": line 2: byte 24 of the file (0xe9) is not UTF-8"),
        ('[{"a": 1}, 3]', ": line 1 (entry 2) is 3, but must be an object with fields"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = written(tmp_path, content)
    assert refusal(path).startswith(f"{path}{message}" if message.startswith(":") else f"{path} {message}")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.json") == f"{tmp_path / 'none.json'} does not exist; it must be a list"
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read (")


def test_a_huge_entry_is_named_by_where_it_begins(tmp_path: Path) -> None:
    sound = json.dumps({"a": "x" * (2**20 - 9)})
    assert len(sound) == 2**20
    path = written(tmp_path, f"[{{}},\n{sound}]")
    assert len(read_entries(path, "a list")) == 2
    path = written(tmp_path, f"[{{}},\n{sound[:-2]}x{sound[-2:]}, 7]")
    message = refusal(path)
    assert message.splitlines()[0] == f"{path} has 2 problems:"
    assert message.splitlines()[1].startswith(
        f"{path}: line 2 (entry 2) has 1048577 characters, and none has more than"
    )
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("text", None, "is None, but must be a text"),
        ("text", "  ", "is '  ', but must be a text"),
        ("text", "\ud800", "holds half of a surrogate pair"),
        ("integer", True, "is True, but must be a whole number from 0 to 2147483647"),
        ("integer", -1, "is -1, but"),
        ("integer", 1.0, "is 1.0, but"),
        ("integer", "-1", "is '-1', but"),
        ("integer", "٣", "is '٣', but"),
        ("integer", 2**31, "is 2147483648, but"),
        ("integer", "9" * 70, "is '" + "9" * 59 + "..., but"),
        ("integers", 3, "is 3, but must be a list"),
        ("integers", [1, "x"], "is 'x', but must be a whole number"),
        ("texts", "ab", "is 'ab', but must be a list"),
        ("texts", [], "is an empty list"),
        ("texts", ["a", " "], "holds ' ', but must be a list of texts that are not empty"),
        ("texts", [1], "holds 1, but"),
        ("scene", "../up", "scene id '../up' is not made of letters, digits and underscores only"),
        ("scene", 3, "is 3, but must be a text"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, method: str, value: object, message: str) -> None:
    path = written(tmp_path, "[" + json.dumps({"a": value}) + "]")
    (entry,) = read_entries(path, "a list")
    with pytest.raises(ValueError, match=re.escape(f"{path}: line 1 (entry 1): field 'a' {message}")):
        getattr(entry, method)("a")
    with pytest.raises(ValueError, match=re.escape("field 'b' is missing; correct the entry or remove it")):
        getattr(entry, method)("b")


def test_sound_fields(tmp_path: Path) -> None:
    path = written(
        tmp_path, '[{"ids": [3, "04"], "none": [], "words": ["a", ""], "name": "scene0000_00", "null": null}]'
    )
    (entry,) = read_entries(path, "a list")
    assert entry.integers("ids") == (3, 4)
    assert entry.integers("none") == ()
    assert entry.texts("words", blanks=True) == ("a", "")
    assert entry.scene("name") == "scene0000_00"
    assert entry.has("ids") and not entry.has("null") and not entry.has("other")


def test_the_first_ten_problems_and_their_number() -> None:
    problems = Problems("file")
    problems.raise_any()
    problems.add("file: one")
    with pytest.raises(ValueError, match=r"^file: one$"):
        problems.raise_any()
    for number in range(11):
        problems.add(f"file: {number}")
    with pytest.raises(ValueError) as caught:
        problems.raise_any()
    lines = str(caught.value).splitlines()
    assert lines == ["file has 12 problems of which the first 10:", "file: one", *(f"file: {n}" for n in range(9))]


def test_a_file_on_one_line_takes_linear_time(tmp_path: Path) -> None:
    entry = json.dumps({"scene_id": "scene0000_00", "token": ["word"] * 20, "description": "x" * 100})
    seconds = []
    for count in (1_000, 8_000):
        path = written(tmp_path, "[" + ", ".join([entry] * count) + "]")
        start = time.process_time()
        assert len(read_entries(path, "a list")) == count
        seconds.append(time.process_time() - start)
    # 8 times as long if linear, 64 times if every entry looked at all that is before it
    assert seconds[1] < 24 * seconds[0] + 0.2


def test_a_document_may_be_of_any_size(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"a": [1] * 2**20}))
    assert len(read_document(path, "a file")["a"]) == 2**20
    with pytest.raises(ValueError, match=r"list\.json: the file ends in the middle of this; it is truncated"):
        read_document(written(tmp_path, '{"a": [1, 2'), "a file")
    with pytest.raises(ValueError, match=r"list\.json: line 1: unexpected '\]' after the end"):
        read_document(written(tmp_path, "{}]"), "a file")
