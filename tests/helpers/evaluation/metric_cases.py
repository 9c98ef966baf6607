"""Assertions that compare recorded scores with computed ones, and the keys of scores with the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.evaluation.metrics.captions import ITEM_MEAN
from w2r2_ds.evaluation.metrics.meteor import Java

TOLERANCE = 1e-6
METEOR = ("METEOR", ITEM_MEAN)
PAGES = Path(__file__).parents[3] / "docs" / "reference" / "metrics"


def has_java(java: Java) -> bool:
    """Whether `java` is the fixture with a Java program."""
    return java.program == "java"


def assert_numbers_equal(
    expected: Mapping[str, Any], got: Mapping[str, Any], where: str = "", scale: float = 1.0
) -> None:
    """Assert that all values of a nested record are present and equal, numbers within `TOLERANCE`.

    Args:
        expected: recorded values.
        got: computed values; may have more keys.
        where: prefix of the failure message.
        scale: factor from the computed unit to the recorded one.
    """
    for name, value in expected.items():
        place = f"{where}/{name}"
        assert name in got, place
        if isinstance(value, Mapping):
            assert_numbers_equal(value, got[name], place, scale)
        elif isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            assert got[name] is not None, place
            assert math.isclose(got[name] * scale, value, rel_tol=0, abs_tol=TOLERANCE), (place, got[name], value)
        else:
            assert got[name] == value, place


def assert_scores_equal(
    expected: Mapping[str, Any], got: Mapping[str, Any], java: Java, tokenizer: str, where: str
) -> None:
    """``assert_numbers_equal`` for caption scores. Without Java, scores that need it must be None."""
    if has_java(java):
        assert_numbers_equal(expected, got, where)
        return
    need_java = METEOR if tokenizer == "none" else tuple(name for name in expected if not name.startswith("EM"))
    assert_numbers_equal({name: value for name, value in expected.items() if name not in need_java}, got, where)
    for name in need_java:
        if name in expected:
            assert got[name] is None, f"{where}/{name}"


def assert_all_fields_read(record: Mapping[str, Any], *known: str) -> None:
    """Assert that a record has no fields besides `known`, so that no recorded number is ignored."""
    unread = set(record) - set(known)
    if unread:
        pytest.fail(f"fields that no test reads: {sorted(unread)}")


def undocumented(keys: Iterable[str], *pages: str) -> set[str]:
    """The keys that are not in backticks on one of these pages of docs/reference/metrics."""
    text = "".join((PAGES / f"{page}.md").read_text() for page in pages)
    return {key for key in keys if f"`{key}`" not in text}


def result_keys(result: Mapping[str, Any]) -> set[str]:
    """All keys of the result of a protocol, nested ones too, without thresholds and reasons of failures."""
    nested = [value for key, value in result.items() if isinstance(value, Mapping) and key != "failures"]
    return {*result, *(key for value in nested for key in result_keys(value))} - {"0.25", "0.5"}
