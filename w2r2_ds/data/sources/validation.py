"""pydantic types shared by the annotation readers, and validation errors that name file, entry and field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.utils.sanitize import CONTROL, one_line

LARGEST_NUMBER = 2**31 - 1
SHOWN_ERRORS = 10
_T = TypeVar("_T")


class FrozenModel(BaseModel):
    """Base of the models: immutable, strings are not converted, fields that are not used are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, arbitrary_types_allowed=True, str_max_length=2**20)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text that is not empty")
    return text


def _no_control(text: str) -> str:
    # names become part of ids and messages
    if CONTROL.search(text):
        raise ValueError("holds a control character")
    return text


def number_or_digits(value: Any) -> int:
    """`whole_number` of an integer or of a string of digits (ScanRefer writes ``"39"``)."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10
    return whole_number(int(value) if digits else value)


def whole_number(value: Any) -> int:
    """An integer from 0, Python's or NumPy's; raises ``ValueError`` for anything else."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError("must be a whole number")
    if not 0 <= value <= LARGEST_NUMBER:
        raise ValueError(f"must be a whole number from 0 to {LARGEST_NUMBER}")
    return int(value)


Text = Annotated[str, AfterValidator(_not_blank)]
Name = Annotated[Text, AfterValidator(_no_control)]
SceneId = Annotated[str, AfterValidator(check_scene_id)]
Integer = Annotated[int, BeforeValidator(whole_number)]
Number = Annotated[int, BeforeValidator(number_or_digits)]


def validate(adapter: TypeAdapter[_T], value: Any, where: Path | str, counted: bool = False) -> _T:
    """Validate decoded content.

    Args:
        adapter: pydantic adapter of the expected type.
        value: decoded JSON or pickle.
        where: file, perhaps with the part of it; begins every message.
        counted: `value` is a list of entries, which the message counts from 1.

    Raises:
        ValueError: the first ten errors, each with `where`, entry, field and the value found.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise_problems(where, describe(error, where, counted))
        raise  # not reached: there is at least one error


def describe(error: ValidationError, where: Path | str, counted: bool = False) -> list[str]:
    """One line per validation error: where, entry, field, what is wrong and the value found."""
    lines = []
    for each in error.errors(include_url=False, include_context=False):
        location = list(each["loc"])
        place = f"{where}: entry {int(location.pop(0)) + 1}" if counted and location else f"{where}"
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
        found = "" if each["type"] == "missing" else f", but is {_short(each['input'])}"
        wrong = each["msg"].removeprefix("Value error, ")
        lines.append(one_line(f"{place}: field {field!r}: {wrong}{found}" if field else f"{place}: {wrong}{found}"))
    return lines


def raise_problems(where: Path | str, problems: list[str]) -> None:
    """Raise ``ValueError`` with the first ten problems and their number, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        first = f", the first {SHOWN_ERRORS}" if len(problems) > SHOWN_ERRORS else ""
        raise ValueError("\n".join([f"{where} has {len(problems)} errors{first}:", *problems[:SHOWN_ERRORS]]))


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}..."
