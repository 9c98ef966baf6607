"""JSON files that others wrote, read so that every complaint names the file, the line and the field.

A file is one JSON list of objects, or one object of lists, pretty-printed or on a single line of many megabytes. It is
decoded member by member, in one pass, so that the line where a member begins is known. What can be collected is: a file
is refused with all that is wrong with it (`Problems`), not with the first thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from w2r2_ds.data.scannet import check_scene_id

LONGEST_ENTRY = 2**20
"""Characters of one member; a real one has some hundreds."""
LARGEST_NUMBER = 2**31 - 1
_SHOWN = 10
_BLANK = re.compile(r"[ \t\r\n]*")
_Value = TypeVar("_Value")


class Problems:
    """What is wrong with a file, gathered and raised at once: the first ten, and how many there are.

    Args:
        path: the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.count = Path(path), 0
        self._first: list[str] = []

    def add(self, message: str) -> None:
        """Note a problem; a full sentence that begins with the file."""
        self.count += 1
        if self.count <= _SHOWN:
            self._first.append(message)

    def read(self, call: Callable[..., _Value], *arguments: Any) -> _Value | None:
        """What `call` returns; None, and one problem more, if it raises ``ValueError``."""
        try:
            return call(*arguments)
        except ValueError as error:
            self.add(str(error))
            return None

    def raise_any(self) -> None:
        """Raise ``ValueError`` if there is a problem."""
        if self.count == 1:
            raise ValueError(self._first[0])
        if self.count:
            first = f" of which the first {_SHOWN}" if self.count > _SHOWN else ""
            raise ValueError("\n".join([f"{self.path} has {self.count} problems{first}:", *self._first]))


@dataclass(frozen=True)
class Entry:
    """One object of a list.

    Attributes:
        fields: as decoded.
        where: ``"FILE: line 12 (entry 3)"``; both count from 1, the line is that where the entry begins.
    """

    fields: Mapping[str, Any]
    where: str

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(field) is not None

    def text(self, field: str) -> str:
        """A string that is more than blanks.

        Raises:
            ValueError: it is anything else.
        """
        value = self._value(field)
        if not isinstance(value, str) or not value.strip():
            self._refuse(field, f"is {_short(value)}, but must be a text that is not empty")
        return self._whole(field, value)

    def integer(self, field: str) -> int:
        """A number from 0, or a string of its digits (ScanRefer writes ``"39"``).

        Raises:
            ValueError: it is anything else.
        """
        return self._number(field, self._value(field))

    def integers(self, field: str) -> tuple[int, ...]:
        """A list of numbers from 0, perhaps empty.

        Raises:
            ValueError: it is anything else.
        """
        return tuple(self._number(field, value) for value in self._list(field))

    def texts(self, field: str, blanks: bool = False) -> tuple[str, ...]:
        """A list of at least one string.

        Args:
            field: its name.
            blanks: whether strings may be empty (tokens are, where a sentence has two blanks).

        Raises:
            ValueError: it is anything else.
        """
        values = self._list(field)
        if not values:
            self._refuse(field, "is an empty list, but must hold a text")
        for value in values:
            if not isinstance(value, str) or not (blanks or value.strip()):
                self._refuse(field, f"holds {_short(value)}, but must be a list of texts that are not empty")
            self._whole(field, value)
        return tuple(values)

    def scene(self, field: str = "scene_id") -> str:
        """A scene's name that is safe in a path.

        Raises:
            ValueError: it is none.
        """
        try:
            return check_scene_id(self.text(field))
        except ValueError as error:
            raise ValueError(
                str(error) if str(error).startswith(self.where) else f"{self._at(field)} {error}"
            ) from None

    def _value(self, field: str) -> Any:
        if field not in self.fields:
            self._refuse(field, "is missing")
        return self.fields[field]

    def _list(self, field: str) -> list[Any]:
        value = self._value(field)
        if not isinstance(value, list):
            self._refuse(field, f"is {_short(value)}, but must be a list")
        return list(value)

    def _number(self, field: str, value: Any) -> int:
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_NUMBER:
            self._refuse(field, f"is {_short(value)}, but must be a whole number from 0 to {LARGEST_NUMBER}")
        return value

    def _whole(self, field: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self._refuse(field, "holds half of a surrogate pair, which no UTF-8 text can")
        return value

    def _at(self, field: str) -> str:
        return f"{self.where}: field {field!r}"

    def _refuse(self, field: str, what: str) -> NoReturn:
        raise ValueError(f"{self._at(field)} {what}; correct the entry or remove it")


def read_entries(path: Path | str, what: str, problems: Problems | None = None) -> list[Entry]:
    """The objects of a JSON list.

    Args:
        path: the file.
        what: what the file is, and where one gets it; ends the sentence if it does not exist.
        problems: takes up entries that are no objects or too large, so that they are reported with the others.

    Raises:
        ValueError: no such file, not UTF-8 (with the byte), no JSON (with the line), truncated, no list; without
            `problems`, also an entry that is no object or has more than ``LONGEST_ENTRY`` characters.
    """
    found = Problems(path) if problems is None else problems
    entries = []
    for value, where, _ in _members(Path(path), what, "["):
        if isinstance(value, dict):
            entries.append(Entry(value, where))
        elif isinstance(value, ValueError):
            found.add(str(value))
        else:
            found.add(f"{where} is {_short(value)}, but must be an object with fields; remove it")
    if problems is None:
        found.raise_any()
    return entries


def read_members(path: Path | str, what: str, problems: Problems) -> list[tuple[str, Any, str]]:
    """Name, value and place (``"FILE: line 12 ('name')"``) of each member of a JSON object; see `read_entries`."""
    members = []
    for value, where, name in _members(Path(path), what, "{"):
        if isinstance(value, ValueError):
            problems.add(str(value))
        else:
            members.append((name, value, where))
    return members


def read_document(path: Path | str, what: str) -> Any:
    """A whole JSON file at once, of any size; errors as in `read_entries`."""
    text = _read(Path(path), what)
    value, end = _decode(Path(path), text, _skip(text, 0), "the file")
    _check_end(Path(path), text, end)
    return value


def _members(path: Path, what: str, opening: str) -> Iterator[tuple[Any, str, str]]:
    """Value (an error if it is too large), place and name (empty in a list) of each member."""
    text = _read(path, what)
    begin = _skip(text, 0)
    kind, closing = ("list", "]") if opening == "[" else ("object", "}")
    if text[begin : begin + 1] != opening:
        found = "is empty" if begin == len(text) else f"begins with {text[begin : begin + 20]!r}"
        raise ValueError(f"{path} {found}, but must hold a JSON {kind}: {what}")
    position, line, counted, number = _skip(text, begin + 1), 1, 0, 0
    while text[position : position + 1] != closing or number:
        number += 1
        line, counted = line + text.count("\n", counted, position), position
        begin, name, where = position, "", f"{path}: line {line} (entry {number})"
        if opening == "{":
            name, position = _name(path, text, position, where)
            where = f"{path}: line {line} ({name!r})"
        value, position = _decode(path, text, position, where)
        if position - begin > LONGEST_ENTRY:
            value = ValueError(f"{where} has {position - begin} characters, but must have {LONGEST_ENTRY} at most")
        yield value, where, name
        position = _skip(text, position)
        if text[position : position + 1] == closing:
            break
        if text[position : position + 1] != ",":
            _refuse_rest(path, text, position, f"after {where.partition(': ')[2]}")
        position = _skip(text, position + 1)
    _check_end(path, text, position + 1)


def _name(path: Path, text: str, position: int, where: str) -> tuple[str, int]:
    name, position = _decode(path, text, position, where)
    position = _skip(text, position)
    if not isinstance(name, str) or text[position : position + 1] != ":":
        _refuse_rest(path, text, position, f"in {where.partition(': ')[2]}")
    return name, _skip(text, position + 1)


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
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line}: byte {error.start} of the file (0x{data[error.start]:02x}) is not UTF-8; "
            "save the file as UTF-8 or copy it again"
        ) from None


def _decode(path: Path, text: str, position: int, where: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or _skip(text, error.pos) == len(text):
            raise ValueError(f"{where if where != 'the file' else path}: {_CUT}") from None
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: no JSON ({error.msg}); {_AGAIN}"
        ) from None
    except _Twice as error:
        raise ValueError(f"{where if where != 'the file' else path}: field {error.args[0]!r} is there twice") from None
    except (RecursionError, ValueError) as error:  # nested thousands of times; a number of thousands of digits
        raise ValueError(f"{where if where != 'the file' else path}: cannot be decoded ({error}); {_AGAIN}") from None


class _Twice(ValueError):
    """A name is in an object twice; JSON allows it, and decoders keep one of the two."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_CUT = "the file ends in the middle of this; it is truncated, so copy it again"
_AGAIN = "copy the file again or correct it"


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _refuse_rest(path: Path, text: str, position: int, place: str) -> NoReturn:
    if position == len(text):
        raise ValueError(f"{path}: the file ends {place}; it is truncated, so copy it again")
    line = text.count("\n", 0, position) + 1
    raise ValueError(f"{path}: line {line}: unexpected {text[position : position + 20]!r} {place}; {_AGAIN}")


def _check_end(path: Path, text: str, position: int) -> None:
    position = _skip(text, position)
    if position < len(text):
        _refuse_rest(path, text, position, "after the end")


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}..."
