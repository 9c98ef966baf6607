"""Lists of objects in JSON that others wrote, read so that every complaint names the file, the line and the field.

A file is refused with all that is wrong with it (`Problems`), not with the first thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from w2r2_ds.data.sources.json_reader import LONGEST_MEMBER, members
from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.utils.sanitize import CONTROL

LARGEST_NUMBER = 2**31 - 1
_SHOWN = 10
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

    def name(self, field: str) -> str:
        """A text that becomes part of an id, and so of messages: on one line, without control characters.

        Raises:
            ValueError: it is anything else.
        """
        value = self.text(field)
        if CONTROL.search(value):
            self._refuse(field, f"is {_short(value)}, which holds a control character")
        return value

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
        self._whole(field, "".join(values))
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
    """The objects of a JSON list, pretty-printed or on a single line of many megabytes.

    Args:
        path: the file.
        what: what the file is, and where one gets it; ends the sentence if it does not exist.
        problems: takes up entries that are no objects or too large, so that they are reported with the others.

    Raises:
        ValueError: no such file, not UTF-8 (with the byte), no JSON (with the line), truncated, no list; without
            `problems`, also an entry that is no object or has more than ``LONGEST_MEMBER`` characters.
    """
    found = Problems(path) if problems is None else problems
    entries = []
    for member in members(Path(path), what, "["):
        if member.length > LONGEST_MEMBER:
            found.add(too_long(member.where, member.length))
        elif isinstance(member.value, dict):
            entries.append(Entry(member.value, member.where))
        else:
            found.add(f"{member.where} is {_short(member.value)}, but must be an object with fields; remove it")
    if problems is None:
        found.raise_any()
    return entries


def too_long(where: str, length: int) -> str:
    """What is said of a member that is larger than any real one."""
    return f"{where} has {length} characters, and none has more than {LONGEST_MEMBER}; correct it or remove it"


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}..."
