"""Arms of an ablation: all combinations of the values of some options of the run configuration."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from w2r2_ds.config.cli import did_you_mean
from w2r2_ds.config.options import in_free_section, options
from w2r2_ds.config.schema import RunConfig

Grid = Mapping[str, Any]
"""Dotted option -> list of values, or a single value."""

LAMBDA = (0, 0.1, 0.5, 1.0, 1.5)
MU = (0.1, 0.3, 0.5, 0.7, 0.9)
PRESETS = ("lambda", "mu", "push_terms")
RESERVED = {
    "out": "every run has its own folder below --out",
    "resume": "interrupted runs are always resumed",
    "train.seed": "use --seeds",
}
"""Options that a grid cannot have -> reason."""
MAX_NAME = 100
"""Longest folder name of an arm, in characters; longer ones end with a hash."""


@dataclass(frozen=True)
class Arm:
    """One combination of values.

    Attributes:
        name: values of its options, such as ``lambda_det=0.5,mu=0.7``; unique in an ablation, and equal in every grid
            that has these values, because it is the name of a folder.
        options: dotted option -> value, in alphabetical order.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Name of its folder: `name` without characters that are unusual in file names."""
        safe = re.sub(r"[^\w.+=,-]", "_", self.name, flags=re.ASCII)
        if safe == self.name and len(safe) <= MAX_NAME:
            return safe
        # Two names may differ in the replaced characters only, or beyond the longest length.
        return f"{safe[:MAX_NAME]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def preset(name: str, push_terms: Sequence[str] = ()) -> list[Grid]:
    """Grids of Fig. 3 of the W2R2 paper (arXiv 2510.17034), or of all push terms.

    Args:
        name: ``lambda`` (0 to 1.5), ``mu`` (no push term, and 0.1 to 0.9) or ``push_terms`` (none, and every other).
        push_terms: names of all registered push terms, for ``push_terms``.

    Raises:
        ValueError: there is no such preset.
    """
    if name == "lambda":
        return [{"objective.lambda_det": list(LAMBDA)}]
    if name == "mu":
        return [{"objective.push_term": "none"}, {"objective.mu": list(MU)}]
    if name == "push_terms":
        return [{"objective.push_term": ["none", *(term for term in push_terms if term != "none")]}]
    raise ValueError(f"--preset is {name!r}; it is one of {', '.join(PRESETS)}.")


def parse_grid(text: str) -> list[Grid]:
    """Decode the YAML of a grid, or of a list of grids whose arms are concatenated.

    Raises:
        ValueError: it is not YAML, or not a mapping of options to values.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--grid is not valid YAML ({' '.join(str(error).split())}).") from None
    grids = value if isinstance(value, list) else [value]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise ValueError(
            f"--grid is {text!r}; it must map options to lists of values, as {{objective.lambda_det: [0, 1.5]}}."
        )
    return grids


def arms_of(grids: Sequence[Grid]) -> list[Arm]:
    """All arms of the grids, in order; an arm that occurs twice is kept once. The last option changes fastest.

    Raises:
        ValueError: an option is unknown or reserved, has no values, or two arms have the same name.
    """
    for name in dict.fromkeys(option for grid in grids for option in grid):
        _check_option(str(name))
    arms: dict[str, Arm] = {}
    for grid in grids:
        values = [value if isinstance(value, list) else [value] for value in grid.values()]
        if empty := [name for name, found in zip(grid, values, strict=True) if not found]:
            raise ValueError(f"--grid: {empty[0]} has no values.")
        for combination in itertools.product(*values):
            given = dict(zip(map(str, grid), combination, strict=True))
            chosen = {name: _canonical(name, given[name]) for name in sorted(given)}
            arm = Arm(",".join(f"{_label(name)}={value_text(value)}" for name, value in chosen.items()), chosen)
            if arms.setdefault(arm.name, arm).options != chosen:
                raise ValueError(f"--grid has two different arms with the name {arm.name}; write their values apart.")
    return list(arms.values())


def value_text(value: Any) -> str:
    """A value as text that the command line decodes to the same value: plain words without quotes."""
    if isinstance(value, str):
        try:
            plain = yaml.safe_load(value) == value
        except yaml.YAMLError:
            plain = False
        return value if plain and not re.search(r"\s", value) else json.dumps(value)
    return json.dumps(value)


def option_words(chosen: Mapping[str, Any]) -> list[str]:
    """Words of a command line that set the options; text options are passed unchanged."""
    known = options(RunConfig)
    words = []
    for name, value in chosen.items():
        raw = name in known and known[name].text
        words.append(f"--{name}={value if raw else value_text(value)}")
    return words


def _check_option(name: str) -> None:
    if name in RESERVED:
        raise ValueError(f"--grid: {name} cannot be an option of a grid; {RESERVED[name]}.")
    if name.startswith("demo."):
        raise ValueError(f"--grid: {name} makes data and models, which all arms share; prepare them separately.")
    if name not in options(RunConfig) and not in_free_section(name):
        raise ValueError(f"--grid: there is no option {name}{did_you_mean(name, options(RunConfig))}.")


def _canonical(name: str, value: Any) -> Any:
    """The value of an option, written in one way: whole numbers as int, keys sorted, values of text options as text."""
    known = options(RunConfig)
    return str(value) if name in known and known[name].text else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _label(name: str) -> str:
    """The last part of an option if no other option has it, else two parts; those of a push term have two."""
    # Not only among the options of this grid: another option in it would rename the other arms, and their folders.
    section, _, last = name.rpartition(".")
    unique = sum(other.rpartition(".")[2] == last for other in options(RunConfig)) <= 1
    return last if unique and not in_free_section(name) else f"{section.rpartition('.')[2]}.{last}"
