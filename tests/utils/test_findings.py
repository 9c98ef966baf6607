"""Findings are counted by kind."""

from __future__ import annotations

from w2r2_ds.utils.findings import Finding, by_kind, by_pattern


def test_one_line_per_kind_with_a_count_and_the_first_example() -> None:
    found = [Finding("flat boxes", "a"), Finding("lost frames", "b", 3), Finding("flat boxes", "c")]
    assert by_kind(found) == ["2 flat boxes, such as a", "3 lost frames, such as b"]
    assert by_kind([]) == []


def test_messages_that_differ_in_scene_and_numbers_are_one_line() -> None:
    messages = [("room_a", "/x/room_a/00010.txt has 3 of 16"), ("b", "/x/b/00020.txt has 15 of 16"), ("", "other")]
    assert by_pattern(messages) == ["/x/room_a/00010.txt has 3 of 16 (and 1 more of this kind)", "other"]
    assert len(by_pattern([("a1", "a1: -1.5e-3 m"), ("a2", "a2: 20 m"), ("a2", "a2: no m")])) == 2
