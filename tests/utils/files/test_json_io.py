"""Reader of JSON and JSON Lines: values, and errors with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2r2_ds.utils.files.json_io import read_json, read_jsonl


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file.json"
    path.write_bytes(content)
    return path


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, b'\xef\xbb\xbf{"a": [1, 2.5, null]}')) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"a": 1', "ends too early"),
        (b'["abc', "ends too early"),
        (b"", "ends too early"),
        (b'{"a": 1,\n "b": x}', "line 2"),
        (b'{"a": 1, "a": 2}', "'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "'b'"),
        (b'{"a":\n"\xff"}', "line 2"),
        (b"[" * 100_000, "file.json"),
    ],
)
def test_errors_name_the_file_and_the_cause(tmp_path: Path, content: bytes, named: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"file\.json") as caught:
        read_json(path)
    assert named in str(caught.value)


def test_a_missing_file_raises_with_the_expected_content(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ScanRefer's annotations"):
        read_json(tmp_path / "none.json", "ScanRefer's annotations")


def test_lines_are_numbered_and_empty_ones_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"id": 1}\n\n{"id": 2}\n')
    assert list(read_jsonl(path)) == [(1, {"id": 1}), (3, {"id": 2})]


def test_an_incomplete_last_line_is_skipped_only_if_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"id": 1}\n{"id":')
    assert list(read_jsonl(path, allow_torn_end=True)) == [(1, {"id": 1})]
    with pytest.raises(ValueError, match="line 2"):
        list(read_jsonl(path))


@pytest.mark.parametrize("line", [b"[1]", b"3", b"{", b'{"a": 1, "a": 1}'])
def test_a_line_that_is_not_an_object_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, b'{"id": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match="line 2"):
        list(read_jsonl(path))
