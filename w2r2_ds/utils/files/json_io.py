"""Read JSON and JSON Lines files; errors name the file, the line and the cause."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path | str, expected: str = "") -> Any:
    """Decode a whole JSON file.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        expected: content and source of the file, for the message if it is missing.

    Raises:
        ValueError: the file is missing, unreadable, not UTF-8 or not JSON, or an object has a duplicate key (the
            decoder would silently keep one of the values).
    """
    return parse_json(read_text(path, expected), str(path))


def read_json_object(path: Path | str, expected: str = "") -> dict[str, Any]:
    """As `read_json`; also raises ValueError if the file's value is not an object."""
    values = read_json(path, expected)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object; copy or download it again.")
    return values


def check_fields(values: Mapping[str, Any], names: Iterable[str], path: Path | str, remedy: str) -> None:
    """Raise ValueError if an object of a file lacks a field: an older version of this package wrote it.

    Args:
        values: the object.
        names: fields that it must have.
        path: the file, for the message.
        remedy: what to do, for the message.
    """
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{path} has no {', '.join(missing)}: an older version of w2r2_ds wrote it; {remedy}.")


def read_jsonl(
    path: Path | str, expected: str = "", allow_torn_end: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Decode a JSON Lines file object by object; empty lines are skipped.

    Args:
        path: UTF-8 file with one JSON object per line.
        expected: as in `read_json`.
        allow_torn_end: skip an incomplete last line, left by a writer that was killed.

    Yields:
        Line number, counted from 1, and the object.

    Raises:
        ValueError: the file is missing or unreadable, or a line is not a JSON object.
    """
    content = _read_bytes(path, expected)
    if allow_torn_end:
        content = content[: content.rfind(b"\n") + 1]  # before decoding: the cut may be inside a character
    for number, line in enumerate(_decode(content, path).split("\n"), start=1):
        if line.strip():
            value = parse_json(line, f"{path}: line {number}")
            if not isinstance(value, dict):
                raise ValueError(f"{path}: line {number} is not a JSON object.")
            yield number, value


def read_text(path: Path | str, expected: str = "") -> str:
    """Text of a UTF-8 file; raises ValueError if it is missing, unreadable or not UTF-8."""
    return _decode(_read_bytes(path, expected), path)


def _read_bytes(path: Path | str, expected: str) -> bytes:
    hint = f"; expected {expected}" if expected else ""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist{hint}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}){hint}.") from None


def _decode(content: bytes, path: Path | str) -> str:
    try:
        return content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte {error.start}); save the file as UTF-8.") from None


def parse_json(text: str, location: str) -> Any:
    """Decode JSON text; raises ValueError with `location`, the source of the text, such as a file and a line."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):  # a truncated file
            cause = "it ends too early, so copy it again"
        else:
            cause = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"{location} is not valid JSON ({cause}).") from None
    except (RecursionError, ValueError) as error:  # too deeply nested, a duplicate key, a huge number
        raise ValueError(f"{location} is not valid JSON ({error}).") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; raises ValueError if a key is repeated."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is given twice")
        result[key] = value
    return result
