"""Compare recorded scores with ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from w2r2_ds.evaluation.metrics.captions import ITEM_MEAN
from w2r2_ds.evaluation.metrics.meteor import Java

TOLERANCE = 1e-6
METEOR = ("METEOR", ITEM_MEAN)


def has_java(java: Java) -> bool:
    """Whether this is the fixture of a machine with Java."""
    return java.program == "java"


def same_numbers(expected: Mapping[str, Any], got: Mapping[str, Any], where: str = "", scale: float = 1.0) -> None:
    """Every number of a nested record is there and equal; texts and flags are equal.

    Args:
        expected: the recorded one.
        got: ours, with the same keys and perhaps more.
        where: for the message.
        scale: ours times this is in the unit of the recorded one.
    """
    for name, value in expected.items():
        place = f"{where}/{name}"
        assert name in got, place
        if isinstance(value, Mapping):
            same_numbers(value, got[name], place, scale)
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            assert got[name] is not None, place
            assert math.isclose(got[name] * scale, value, rel_tol=0, abs_tol=TOLERANCE), (place, got[name], value)
        else:
            assert got[name] == value, place


def same_scores(expected: Mapping[str, Any], got: Mapping[str, Any], java: Java, tokenizer: str, where: str) -> None:
    """``same_numbers`` for caption scores: None, and never a number, where Java is needed and missing."""
    if has_java(java):
        same_numbers(expected, got, where)
        return
    lost = METEOR if tokenizer == "none" else tuple(name for name in expected if not name.startswith("EM"))
    same_numbers({name: value for name, value in expected.items() if name not in lost}, got, where)
    for name in lost:
        if name in expected:
            assert got[name] is None, f"{where}/{name}"


def only(record: Mapping[str, Any], *known: str) -> None:
    """No part of a record goes unread."""
    unread = set(record) - set(known)
    if unread:
        pytest.fail(f"nothing reads {sorted(unread)}")
