"""pydantic types shared by the readers of annotations, and validation errors that name file, entry and field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.utils.sanitize import CONTROL, one_line

LARGEST_NUMBER = 2**31 - 1
SHOWN_ERRORS = 10
"""Maximum number of errors in a message."""
_T = TypeVar("_T")


class FrozenModel(BaseModel):
    """Base model of file contents: immutable; fields of the file that the model does not have are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, arbitrary_types_allowed=True, str_max_length=2**20)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text that is not empty")
    return text


def _no_control(text: str) -> str:
    # Names become part of ids and messages, where a control character could forge a line.
    if CONTROL.search(text):
        raise ValueError("holds a control character")
    return text


def integer_or_digits(value: Any) -> int:
    """`integer` of an integer or of a string of digits (ScanRefer writes ``"39"``)."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10
    return integer(int(value) if digits else value)


def integer(value: Any) -> int:
    """A Python or NumPy integer from 0 to ``LARGEST_NUMBER``, as int; raises ValueError for any other value."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError("must be a whole number")
    if not 0 <= value <= LARGEST_NUMBER:
        raise ValueError(f"must be a whole number from 0 to {LARGEST_NUMBER}")
    return int(value)


Text = Annotated[str, AfterValidator(_not_blank)]
"""Text that is not blank."""
Name = Annotated[Text, AfterValidator(_no_control)]
"""Text that is not blank, without control characters."""
SceneId = Annotated[str, AfterValidator(check_scene_id)]
"""Scene name that is safe in a path."""
Integer = Annotated[int, BeforeValidator(integer)]
"""Integer from 0."""
IntegerOrDigits = Annotated[int, BeforeValidator(integer_or_digits)]
"""Integer from 0, in the file perhaps as a string of digits."""


def validate(adapter: TypeAdapter[_T], value: Any, location: Path | str, counted: bool = False) -> _T:
    """Validate decoded content.

    Args:
        adapter: pydantic adapter of the expected type.
        value: decoded JSON or pickle.
        location: file, or part of a file such as ``FILE: line 3``; every message begins with it.
        counted: whether `value` is a list of entries; messages then have the number of the entry, from 1.

    Raises:
        ValueError: the content is invalid. The message has location, entry, field and value of the first ten errors.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise_problems(location, error_lines(error, location, counted))
        raise  # not reached: there is at least one error


def error_lines(
    error: ValidationError, location: Path | str, counted: bool = False, prefix: tuple[str | int, ...] = ()
) -> list[str]:
    """One line per error of a pydantic `ValidationError`: location, entry, field, problem and value.

    Args:
        error: error of pydantic.
        location: file, or part of a file; every line begins with it.
        counted: whether the validated value is a list of entries; lines then have the number of the entry, from 1.
        prefix: names and list indices that lead from `location` to the validated value.
    """
    lines = []
    for each in error.errors(include_url=False, include_context=False):
        path = [*prefix, *each["loc"]]  # names and list indices that lead to the value
        place = f"{location}: entry {int(path.pop(0)) + 1}" if counted and path else f"{location}"
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        found = "" if each["type"] == "missing" else f", but is {_short_repr(each['input'])}"
        problem = each["msg"].removeprefix("Value error, ")  # pydantic's prefix for messages of the validators above
        lines.append(one_line(f"{place}: field {field!r}: {problem}{found}" if field else f"{place}: {problem}{found}"))
    return lines


def raise_problems(location: Path | str, problems: list[str]) -> None:
    """Raise ValueError with the number of problems and the first ten, if there are any.

    Args:
        location: file, or part of a file.
        problems: one line per problem.
    """
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        first = f", the first {SHOWN_ERRORS}" if len(problems) > SHOWN_ERRORS else ""
        raise ValueError("\n".join([f"{location} has {len(problems)} errors{first}:", *problems[:SHOWN_ERRORS]]))


def _short_repr(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}..."
