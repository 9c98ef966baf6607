"""JSON files decoded member by member, in one pass, so that the line where each begins is known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LONGEST_MEMBER = 2**20
"""Characters of one entry of a list, or of one scene's boxes; real ones have hundreds or thousands."""

_BLANK = re.compile(r"[ \t\r\n]*")
_CUT = "it is truncated, so copy it again"
_AGAIN = "copy the file again or correct it"


@dataclass(frozen=True, slots=True)
class Member:
    """One value of a list or an object.

    Attributes:
        value: as decoded.
        where: ``"FILE: line 12 (entry 3)"`` or ``"FILE: line 12 ('name')"``; both count from 1, the line is that where
            the member begins.
        name: its name in an object; empty in a list.
        length: its characters.
    """

    value: Any
    where: str
    name: str
    length: int


def members(path: Path, what: str, opening: str) -> Iterator[Member]:
    """The members of a file that is one list (`opening` is ``"["``) or one object (``"{"``).

    Args:
        path: the file.
        what: what the file is, and where one gets it; ends the sentence if it does not exist.
        opening: see above.

    Raises:
        ValueError: no such file, not UTF-8 (with the byte), no JSON (with the line), truncated, or neither of the two.
    """
    text = _read(path, what)
    kind, closing = ("list", "]") if opening == "[" else ("object", "}")
    begin = _skip(text, 0)
    if text[begin : begin + 1] != opening:
        found = "is empty" if begin == len(text) else f"begins with {text[begin : begin + 20]!r}"
        raise ValueError(f"{path} {found}, but must hold a JSON {kind}; it must be {what}")
    position, line, counted, number = _skip(text, begin + 1), 1, 0, 0
    while number or text[position : position + 1] != closing:
        number += 1
        line, counted, begin = line + text.count("\n", counted, position), position, position
        name, place = "", f"line {line} (entry {number})"
        if opening == "{":
            name, position = _name(path, text, position, place)
            place = f"line {line} ({name!r})"
        value, position = _decode(path, text, position, place)
        yield Member(value, f"{path}: {place}", name, position - begin)
        position = _skip(text, position)
        if text[position : position + 1] == closing:
            break
        if text[position : position + 1] != ",":
            _refuse_rest(path, text, position, f"after {place}")
        position = _skip(text, position + 1)
    _check_end(path, text, position + 1)


def read_document(path: Path | str, what: str) -> Any:
    """A whole JSON file at once, of any size; errors as in `members`."""
    path = Path(path)
    text = _read(path, what)
    value, end = _decode(path, text, _skip(text, 0), "")
    _check_end(path, text, end)
    return value


def _read(path: Path, what: str) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it must be {what}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); it must be {what}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # a mark at the beginning is not counted by the decoder
        byte = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, byte) + 1
        raise ValueError(
            f"{path}: line {line}: byte {byte} of the file (0x{data[byte]:02x}) is not UTF-8; "
            "save the file as UTF-8 or copy it again"
        ) from None


class _Twice(ValueError):
    """A name is in an object twice; JSON allows it, and decoders keep one of the two."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _decode(path: Path, text: str, position: int, place: str) -> tuple[Any, int]:
    """The value at `position` and where it ends."""
    where = f"{path}: {place}" if place else f"{path}"
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or _skip(text, error.pos) == len(text):
            raise ValueError(f"{where}: the file ends in the middle of this; {_CUT}") from None
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: no JSON ({error.msg}); {_AGAIN}"
        ) from None
    except _Twice as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is there twice; remove one of the two") from None
    except (RecursionError, ValueError) as error:  # nested thousands of times; a number of thousands of digits
        raise ValueError(f"{where}: cannot be decoded ({error}); {_AGAIN}") from None


def _name(path: Path, text: str, position: int, place: str) -> tuple[str, int]:
    """The name at `position` and where its value begins."""
    name, position = _decode(path, text, position, place)
    position = _skip(text, position)
    if not isinstance(name, str) or text[position : position + 1] != ":":
        _refuse_rest(path, text, position, f"in {place}")
    return name, _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    """Where the blanks at `position` end."""
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _refuse_rest(path: Path, text: str, position: int, place: str) -> NoReturn:
    if position == len(text):
        raise ValueError(f"{path}: the file ends {place}; {_CUT}")
    line = text.count("\n", 0, position) + 1
    raise ValueError(f"{path}: line {line}: unexpected {text[position : position + 20]!r} {place}; {_AGAIN}")


def _check_end(path: Path, text: str, position: int) -> None:
    position = _skip(text, position)
    if position < len(text):
        _refuse_rest(path, text, position, "after the end")
