"""Reader of ScanNet's layout: values, and errors for damaged folders."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hand_scene import ALIGN, BOXES, CAMERA, INTRINSIC, SCENE, moved
from w2r2_ds.data.sources.frames import LOST_POSE
from w2r2_ds.data.sources.scannet import load_scene


def test_scene_is_read_and_aligned(root: Path) -> None:
    scene = load_scene(root, SCENE)
    assert [frame.index for frame in scene.frames] == [0, 1, 2]
    assert scene.frames_without_pose == 1
    np.testing.assert_allclose(scene.frames[0].cam_to_world, CAMERA, atol=1e-12)
    np.testing.assert_allclose(scene.frames[1].cam_to_world, moved(1.0), atol=1e-12)
    np.testing.assert_array_equal(scene.axis_align, ALIGN)
    np.testing.assert_array_equal(scene.intrinsic, INTRINSIC)
    np.testing.assert_array_equal(scene.depth_intrinsic, INTRINSIC)
    assert sorted(scene.instances) == [0, 3, 4]  # the all-zero row is no instance
    assert (scene.instances[4].label_id, scene.instances[4].object_id) == (7, 4)
    np.testing.assert_array_equal(scene.instances[0].box, [2.0, 5.0, 1.0, 0.8, 0.6, 1.0])


@pytest.mark.parametrize("scene_id", ["../secret", "a/b", "", "scene0000_00\n", "a.b"])
def test_unsafe_scene_ids_are_rejected(root: Path, scene_id: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        load_scene(root, scene_id)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("posed_images/{}/00001.txt", "1 0 0 0\n0 1 0", "00001.txt: the pose has 7 numbers instead of 16"),
        ("posed_images/{}/00001.txt", "x " * 16, "00001.txt: the pose holds something that is not a number"),
        ("posed_images/{}/intrinsic.txt", "0 " * 16, "intrinsic.txt: the focal lengths must be positive"),
        ("posed_images/{}/depth_intrinsic.txt", "", "depth_intrinsic.txt: the intrinsic matrix has 0 numbers"),
        ("scans/{}/{}.txt", "axisAlignment = 1 0 0", "axisAlignment has 3 numbers instead of 16"),
        ("scans/{}/{}.txt", "axisAlignment = " + "1 " * 16, "axisAlignment is not a rotation"),
        ("scans/{}/{}.txt", "sceneType = Lobby", "no line 'axisAlignment = 16 numbers'"),
        ("scannet_data/{}_aligned_bbox.npy", "not an array", "aligned_bbox.npy is not a readable array"),
    ],
)
def test_a_broken_text_file_raises_with_its_name(root: Path, file: str, content: str, message: str) -> None:
    (root / file.format(SCENE, SCENE)).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_scene(root, SCENE)


@pytest.mark.parametrize(
    "file", ["posed_images/{}/intrinsic.txt", "scans/{}/{}.txt", "scannet_data/{}_aligned_bbox.npy"]
)
def test_a_missing_file_raises_with_its_name(root: Path, file: str) -> None:
    path = root / file.format(SCENE, SCENE)
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        load_scene(root, SCENE)


def test_a_truncated_array_raises_with_its_name(root: Path) -> None:
    path = root / "scannet_data" / f"{SCENE}_aligned_bbox.npy"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"aligned_bbox\.npy is not a readable array"):
        load_scene(root, SCENE)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 6)), r"must hold numbers \[N, 8\]"),
        (
            np.array([[0, 0, 0, -1, 1, 1, 5, 6]]),
            r"row 0 \(object 6\) has the size \[-1.0, 1.0, 1.0\], and a box has posi",
        ),
        (np.array([[0, 0, 0, 1, 1, np.nan, 5, 0]]), "row 0 has a non-finite value"),
        (np.array([[0, 0, 0, 1, 1, 1, 5, 0.5]]), "an id that is no integer"),
        (np.array([[0, 0, 0, 1, 1, 1, 5, 2]] * 2), "row 1 repeats object id 2"),
    ],
)
def test_a_file_of_broken_boxes_is_rejected(root: Path, rows: np.ndarray, message: str) -> None:
    np.save(root / "scannet_data" / f"{SCENE}_aligned_bbox.npy", rows)
    with pytest.raises(ValueError, match=message):
        load_scene(root, SCENE)


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        ([0, 0, 0, 1, 0, 1, 5, 9], [9]),
        ([0, 0, 0, 1, 1, np.nan, 5, 9], [9]),
        ([np.inf, 0, 0, 1, 1, 1, 5, 9], [9]),
        ([0, 0, 0, 1, 1, 1, 5, 9.5], []),
        ([0, 0, 0, 1, 1, 1, 5, np.nan], []),
        ([2, 5, 1, 1, 1, 1, 5, 0], [0]),  # a second box of object 0: it is unknown which is right
    ],
)
def test_a_broken_box_is_skipped_and_counted(root: Path, row: list[float], broken: list[int]) -> None:
    np.save(root / "scannet_data" / f"{SCENE}_aligned_bbox.npy", np.vstack([BOXES, row]))
    scene = load_scene(root, SCENE)
    assert list(scene.broken_boxes) == broken
    assert sorted(scene.instances) == [number for number in (0, 3, 4) if number not in broken]
    (finding,) = [each for each in scene.skipped_inputs if "boxes" in each.kind]
    assert f"{SCENE}_aligned_bbox.npy: row 4 " in finding.example


def test_pickled_arrays_are_rejected(root: Path) -> None:
    np.save(root / "scannet_data" / f"{SCENE}_aligned_bbox.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="not a readable array"):
        load_scene(root, SCENE)


def test_a_scene_without_valid_poses_is_an_error(root: Path) -> None:
    for i in range(3):
        (root / "posed_images" / SCENE / f"{i:05d}.txt").write_text("nan " * 16)
    with pytest.raises(ValueError, match=rf"no frame that can be used \(4 {re.escape(LOST_POSE)}\)"):
        load_scene(root, SCENE)


def test_a_missing_scene_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; .*, or correct data\.root \(or --root\)"):
        load_scene(root, "scene0001_00")
