"""Depth image, intrinsics and pose of a frame: found in every layout; errors name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_scene import ALIGN, INTRINSIC, SCENE
from w2r2_ds.data.sources.depth_frames import check_depth_frame, find_depth_frame
from w2r2_ds.data.sources.scannet import load_scene


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "posed_images" / SCENE


def test_files_of_a_frame(root: Path, folder: Path) -> None:
    scene = load_scene(root, SCENE)
    for frame in scene.frames:
        found = find_depth_frame(frame.color, with_pose=True)
        assert found.depth == frame.depth
        np.testing.assert_array_equal(found.cam_to_world, frame.cam_to_world)
        np.testing.assert_array_equal(found.intrinsic, scene.intrinsic[:3, :3])
        check_depth_frame(frame.color, True)
    assert np.isnan(find_depth_frame(folder / "00003.jpg", with_pose=False).cam_to_world).all()


def test_files_of_scannets_own_extractor(tmp_path: Path) -> None:
    folder = tmp_path / "posed_images" / "scene0001_00"
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(folder / "color" / "7.jpg")
    Image.fromarray(np.full((24, 32), 2000, dtype=np.uint16)).save(folder / "depth" / "7.png")
    np.savetxt(folder / "pose" / "7.txt", np.eye(4))
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", INTRINSIC)
    np.savetxt(folder / "intrinsic" / "intrinsic_depth.txt", INTRINSIC * [[0.5], [0.5], [1], [1]])
    scan = tmp_path / "scans" / "scene0001_00" / "scene0001_00.txt"
    scan.parent.mkdir(parents=True)
    scan.write_text("axisAlignment = " + " ".join(map(str, ALIGN.ravel())))
    found = find_depth_frame(folder / "color" / "7.jpg", with_pose=True)
    assert found.depth == folder / "depth" / "7.png" and found.depth_intrinsic[0, 0] == 20.0
    np.testing.assert_array_equal(found.cam_to_world, ALIGN)
    check_depth_frame(folder / "color" / "7.jpg", True)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "00000.png").unlink()
    (folder / "00001.txt").unlink()
    with pytest.raises(ValueError, match=r"00000\.jpg has no depth image"):
        find_depth_frame(folder / "00000.jpg", with_pose=False)
    with pytest.raises(ValueError, match=r"00001\.jpg has no camera pose"):
        find_depth_frame(folder / "00001.jpg", with_pose=True)
    assert find_depth_frame(folder / "00001.jpg", with_pose=False).depth == folder / "00001.png"
    with pytest.raises(ValueError, match=r"00003\.txt"):
        find_depth_frame(folder / "00003.jpg", with_pose=True)
    with pytest.raises(ValueError, match=r"00009\.jpg"):
        find_depth_frame(folder / "00009.jpg", with_pose=False)


@pytest.mark.parametrize("name", ["intrinsic.txt", "depth_intrinsic.txt"])
def test_missing_intrinsics_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"/{name}"):
        find_depth_frame(folder / "00000.jpg", with_pose=False)


@pytest.mark.parametrize("name", ["intrinsic.txt", "depth_intrinsic.txt"])
def test_intrinsics_of_another_size(folder: Path, name: str) -> None:
    np.savetxt(folder / name, INTRINSIC * [[10], [10], [1], [1]])
    find_depth_frame(folder / "00000.jpg", with_pose=False)
    with pytest.raises(ValueError, match=rf"/{name} has the principal point"):
        check_depth_frame(folder / "00000.jpg", with_pose=False)


def test_a_truncated_depth_image(folder: Path) -> None:
    path = folder / "00000.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00000\.png is not a readable depth image"):
        check_depth_frame(folder / "00000.jpg", with_pose=False)
