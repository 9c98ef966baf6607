"""Files of predictions, line by line: every complaint names file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """One line of a file.

    Attributes:
        values: its JSON object.
        where: file and line number, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field, ``doc.metadata.object_id`` for one of an object within.

        Raises:
            ValueError: it is missing, or of another kind.
        """
        value: Any = self.values
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"{self.where} has no field {name!r}; is it a file of another format (--format)?")
            value = value[part]
        if not isinstance(value, kind):
            raise ValueError(f"{self.where}: field {name!r} is {str(value)[:60]!r}, of another type than expected.")
        return value

    def numbers(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A field of finite numbers, float64; -1 in the shape for any length.

        Raises:
            ValueError: it is missing or something else.
        """
        value = self.get(name, list)
        try:
            array = np.array(value, dtype=np.float64)
        except (ValueError, TypeError):
            array = np.empty(())
        if not array.size and shape[0] == -1:
            array = array.reshape(0, *shape[1:])
        fits = array.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, array.shape, strict=True))
        if not fits or not np.isfinite(array).all():
            raise ValueError(f"{self.where}: field {name!r} is no list of {'x'.join(map(str, shape))} finite numbers.")
        return array

    def members(self, name: str) -> Iterator[Line]:
        """The objects of a field that is a list of objects."""
        for number, value in enumerate(self.get(name, list)):
            where = f"{self.where}: {name}[{number}]"
            if not isinstance(value, dict):
                raise ValueError(f"{where} is no JSON object.")
            yield Line(value, where)


def read_lines(file: Path) -> Iterator[Line]:
    """The JSON objects of a file, empty lines left out.

    Raises:
        ValueError: the file is missing, or a line is no UTF-8 or no JSON object.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); correct --score_only.") from None
    for number, content in enumerate(lines, start=1):
        where = f"{file}: line {number}"
        if not content.strip():
            continue
        try:
            values = json.loads(content.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not readable JSON ({error}); was the file cut off?") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where} is no JSON object; is it a file of another format (--format)?")
        yield Line(values, where)
