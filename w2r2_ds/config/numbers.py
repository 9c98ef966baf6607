"""Ranges of numeric options: a number that no run can use is one sentence at the start, not an overflow later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

MAX_NUMBER = 10**9
"""Largest value of a numeric option. Products of two options, seconds as C++ durations and GiB in bytes fit 64 bits."""


def check_numbers(value: Any, name: str, minimum: float = 0) -> None:
    """Check all numbers of an option: a number, or nested sequences, mappings and dataclasses of them.

    Args:
        value: value of the option.
        name: name of the option, for the message.
        minimum: smallest value.

    Raises:
        ValueError: a number is not finite, below `minimum` or above `MAX_NUMBER`.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_numbers(each, f"{name}.{key}" if name else str(key), minimum)
    elif isinstance(value, list | tuple):
        for each in value:
            check_numbers(each, name, minimum)
    elif isinstance(value, int | float) and not minimum <= value <= MAX_NUMBER:  # also NaN, which is not in any range
        raise ValueError(f"{name} is {repr(value)[:40]}; it must be a number between {minimum} and {MAX_NUMBER}.")
