"""Proposed boxes: what is read and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from w2r2_ds.data.sources.proposals import read_proposals

BOX = [1.0, 2.0, 0.5, 0.4, 0.6, 1]


def written(folder: Path, content: str) -> Path:
    path = folder / "scannet_val_pred_box.json"
    path.write_text(content)
    return path


def test_proposals(tmp_path: Path) -> None:
    whole = {"scannet/scene0011_00": [BOX, [0, 0, 0, 1, 1, 1]], "scene0011_01": []}
    for indent in (None, 2):
        proposals = read_proposals(written(tmp_path, json.dumps(whole, indent=indent)))
        assert list(proposals) == ["scene0011_00", "scene0011_01"]
        np.testing.assert_array_equal(proposals["scene0011_00"], np.array([BOX, [0, 0, 0, 1, 1, 1]]))
        assert {(boxes.dtype, boxes.shape[1]) for boxes in proposals.values()} == {(np.dtype("f8"), 6)}
        assert len(proposals["scene0011_01"]) == 0


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1, 2, 3, 0, 1, 1], "box 1 (from 0) has the size [0, 1, 1], and a box has positive sides"),
        ([1, 2, 3, 1, 1, -0.5], "box 1 (from 0) has the size [1, 1, -0.5]"),
        ([1, 2, 3, 1, 1], "box 1 (from 0) is not six finite numbers"),
        ([1, 2, float("nan"), 1, 1, 1], "box 1 (from 0) is not six finite numbers"),
        ([float("inf"), 2, 3, 1, 1, 1], "box 1 (from 0) is not six finite numbers"),
        ([10**400, 2, 3, 1, 1, 1], "box 1 (from 0) is not six finite numbers"),
        ([1, 2, 3, True, 1, 1], "box 1 (from 0) is not six finite numbers"),
        ([1, 2, 3, "1", 1, 1], "box 1 (from 0) is not six finite numbers"),
        (7, "box 1 (from 0) is not six finite numbers"),
    ],
)
def test_a_bad_box_is_named(tmp_path: Path, box: object, message: str) -> None:
    path = written(tmp_path, '{"a": [],\n"scannet/scene0011_00": ' + json.dumps([BOX, box]) + "}")
    with pytest.raises(ValueError, match=re.escape(f"{path}: line 2 ('scannet/scene0011_00'): {message}")):
        read_proposals(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"scannet/a": [],\n "a": []}', ": line 2 ('a'): scene a is there twice; remove one of the two"),
        ('{"a": [], "a": []}', ": line 1 ('a'): scene a is there twice"),
        ('{"../a": []}', ": line 1 ('../a'): scene id '../a' is not made of letters"),
        ('{"a": 3}', ": line 1 ('a'): is no list of boxes"),
        ('{"a": [[1, 2', ": line 1 ('a'): the file ends in the middle of this; it is truncated"),
        ('{"a": [],\n"b', ": line 2 (entry 2): the file ends in the middle of this"),
        ('{"a" []}', ": line 1: unexpected '[]}' in line 1 (entry 1)"),
        ("{3: []}", ": line 1: unexpected ': []}' in line 1 (entry 1)"),
        ("[]", " begins with '[]', but must hold a JSON object"),
        ("{}", " has no scene; it must be a JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_proposals(path)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"a": [[1]] * 8, "b": [BOX, [2]], "c/d": [], "e": [["x"]] * 3}))
    with pytest.raises(ValueError, match=f"{path} has 13 problems of which the first 10:"):
        read_proposals(path)


def test_a_huge_scene_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"a": [BOX] * 40_000}))
    with pytest.raises(ValueError, match=r"line 1 \('a'\) has \d{7} characters, and none has more than 1048576"):
        read_proposals(path)
