"""Findings are counted by kind."""

from __future__ import annotations

from w2r2_ds.utils.findings import Finding, by_kind


def test_one_line_per_kind_with_a_count_and_the_first_example() -> None:
    found = [Finding("flat boxes", "a"), Finding("lost frames", "b", 3), Finding("flat boxes", "c")]
    assert by_kind(found) == ["2 flat boxes, such as a", "3 lost frames, such as b"]
    assert by_kind([]) == []
