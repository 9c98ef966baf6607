"""Detector proposals: boxes and errors."""

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


def test_reads_proposals(tmp_path: Path) -> None:
    whole = {"scannet/scene0011_00": [BOX, [0, 0, 0, 1, 1, 1]], "scene0011_01": []}
    for indent in (None, 2):
        proposals = read_proposals(written(tmp_path, json.dumps(whole, indent=indent)))
        assert list(proposals) == ["scene0011_00", "scene0011_01"]
        np.testing.assert_array_equal(proposals["scene0011_00"], np.array([BOX, [0, 0, 0, 1, 1, 1]]))
        assert {(boxes.dtype, boxes.shape[1]) for boxes in proposals.values()} == {(np.dtype("f8"), 6)}
        assert len(proposals["scene0011_01"]) == 0


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ([1, 2, 3, 0, 1, 1], ""),
        ([1, 2, 3, 1, 1, -0.5], ""),
        ([1, 2, 3, 1, 1], ""),
        ([1, 2, float("nan"), 1, 1, 1], "[2]"),
        ([float("inf"), 2, 3, 1, 1, 1], "[0]"),
        ([10**400, 2, 3, 1, 1, 1], "[0]"),
        ([1, 2, 3, True, 1, 1], "[3]"),
        ([1, 2, 3, "1", 1, 1], "[3]"),
        (7, ""),
    ],
)
def test_a_broken_box_is_skipped_and_recorded(tmp_path: Path, box: object, place: str) -> None:
    path = written(tmp_path, json.dumps({"a": [], "scannet/scene0011_00": [BOX, box, BOX]}))
    proposals = read_proposals(path)
    np.testing.assert_array_equal(proposals["scene0011_00"], [BOX, BOX])
    assert proposals.indices == {"a": (), "scene0011_00": (0, 2)}
    ((scene_id, (message,)),) = proposals.broken_boxes.items()
    assert scene_id == "scene0011_00"
    assert message.startswith(f"{path}: field 'scannet/scene0011_00[1]{place}'") and not proposals.broken
    path = written(tmp_path, json.dumps({"scannet/scene0011_00": [box]}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: field 'scannet/scene0011_00[0]{place}'")):
        read_proposals(path)


@pytest.mark.parametrize("boxes", [[[1, 2]], 3])
def test_a_scene_of_broken_boxes_is_skipped_in_the_file(tmp_path: Path, boxes: object) -> None:
    path = written(tmp_path, json.dumps({"scannet/b": [BOX], "scannet/a": boxes}))
    proposals = read_proposals(path)
    assert list(proposals) == ["b"] and list(proposals.broken) == ["a"]
    assert "field 'scannet/a" in proposals.broken["a"]


def test_a_scene_that_occurs_twice_is_skipped_in_the_file(tmp_path: Path) -> None:
    twice = {"scannet/a": [BOX, [1]], "b": [BOX], "a": [BOX]}
    proposals = read_proposals(written(tmp_path, json.dumps(twice)))
    assert list(proposals) == ["b"] and "scene a occurs twice" in proposals.broken["a"] and not proposals.broken_boxes


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"scannet/a": [], "a": []}', "scene a"),
        ('{"a": [], "a": []}', "'a'"),
        ('{"../a": []}', "'../a'"),
        ('{"a": 3}', "field 'a'"),
        ('{"a": [[1, 2', "copy it again"),
        ('{"a" []}', "line 1"),
        ("[]", ""),
        ("{}", "no scene"),
    ],
)
def test_a_broken_file_raises_with_its_name(tmp_path: Path, content: str, named: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_proposals(path)
    assert named in str(caught.value)


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"a": [[1]] * 8, "b": [[2]], "e": [["x"]] * 3}))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_proposals(path)
    assert len(str(caught.value).splitlines()) == 11
