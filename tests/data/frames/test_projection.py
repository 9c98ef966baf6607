"""Projected area and visible fraction of a box, and unusable depth images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_scene import CAMERA, INTRINSIC, SCENE
from w2r2_ds.data.frames.projection import load_depth, projected_area, visible_fraction
from w2r2_ds.data.frames.visibility import visible_frames_by_depth
from w2r2_ds.data.sources.scannet import Scene, load_scene

SIZE = (64, 48)


@pytest.fixture
def scene(root: Path) -> Scene:
    return load_scene(root, SCENE)


def test_area_of_a_box_in_front_of_the_camera() -> None:
    # 1 m wide and high, its front 2 m away: 40 * 1 / 2 = 20 pixels square
    assert projected_area(np.array([1.0, 4.5, 1.5, 1.0, 1.0, 1.0]), CAMERA, INTRINSIC, SIZE) == pytest.approx(400.0)
    # a wall fills the image: pixels 0..63 by 0..47
    assert projected_area(np.array([1.0, 4.5, 1.5, 20.0, 1.0, 20.0]), CAMERA, INTRINSIC, SIZE) == 63 * 47


def test_area_is_zero_where_the_box_is_not_visible() -> None:
    inside = np.array([1.0, 2.0, 1.5, 1.0, 1.0, 1.0])
    behind = np.array([1.0, -3.0, 1.5, 1.0, 1.0, 1.0])
    beside = np.array([90.0, 4.0, 1.5, 1.0, 1.0, 1.0])
    for box in (inside, behind, beside):
        assert projected_area(box, CAMERA, INTRINSIC, SIZE) == 0.0


def test_area_of_a_turned_box() -> None:
    # a quarter turn about z: its own x is the world's y, so it is 1 m wide, 0.5 m deep, its front 2 m away
    box = np.array([1.0, 4.25, 1.5, 0.5, 1.0, 1.0, np.pi / 2, 0.0, 0.0])
    assert projected_area(box, CAMERA, INTRINSIC, SIZE) == pytest.approx(400.0)
    # a plate 4 m wide, turned by 45 degrees: the camera is in the box around it, but not in it
    around = np.array([1.0, 2.5, 1.5, 4.0, 0.1, 1.0])
    plate = np.concatenate([around, [np.pi / 4, 0.0, 0.0]])
    assert projected_area(plate, CAMERA, INTRINSIC, SIZE) > 0.0
    inside = np.array([1.0 + 0.5 * np.cos(1.3), 2.0 + 0.5 * np.sin(1.3), 1.5, 4.0, 0.1, 1.0, 1.3, 0.0, 0.0])
    assert projected_area(inside, CAMERA, INTRINSIC, SIZE) == 0.0


def test_visible_fraction_excludes_occluders_and_background(scene: Scene) -> None:
    box = scene.instances[0].box
    seen = np.full((48, 64), 3000, dtype=np.uint16)
    assert visible_fraction(box, CAMERA, INTRINSIC, seen) > 0.9  # all but rays that cut the box's edge
    for millimetres in (2000, 5000, 0):  # an occluder, the background, no measurement
        depth = np.full((48, 64), millimetres, dtype=np.uint16)
        assert visible_fraction(box, CAMERA, INTRINSIC, depth) == 0.0
    half = np.full((48, 64), 3000, dtype=np.uint16)
    half[:, :45] = 1000  # something in front of the left half
    assert 0.2 < visible_fraction(box, CAMERA, INTRINSIC, half) < 0.8


def test_bad_depth_images_raise_with_the_file(scene: Scene) -> None:
    path = scene.frames[0].depth
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"00000.png is not a readable depth image"):
        load_depth(scene.frames[0])
    Image.new("RGB", SIZE).save(path)
    with pytest.raises(ValueError, match=r"00000.png is not a 16-bit one-channel depth image"):
        load_depth(scene.frames[0])


@pytest.mark.parametrize("millimetres", [3, 99, 20_001, 30_000])
def test_a_wrong_depth_scale_raises(scene: Scene, millimetres: int) -> None:
    Image.fromarray(np.full((48, 64), millimetres, dtype=np.uint16)).save(scene.frames[1].depth)
    metres = re.escape(f"{millimetres / 1000:g} m")
    with pytest.raises(ValueError, match=rf"00001.png: read as millimetres, the median depth is {metres}, which is"):
        load_depth(scene.frames[1])
    with pytest.raises(ValueError, match=r"00001.png: read as millimetres"):
        visible_frames_by_depth(scene, [scene.instances[0].box])


def test_plausible_depths_pass(scene: Scene) -> None:
    nothing, nearest, farthest, stray = (np.full((48, 64), value, dtype=np.uint16) for value in (0, 100, 20_000, 2500))
    stray[:20], stray[44:] = 65_535, 0  # through a window: fewer than half of the measurements
    for depth in (nothing, nearest, farthest, stray):
        Image.fromarray(depth).save(scene.frames[0].depth)
        assert (load_depth(scene.frames[0]) == depth).all()
