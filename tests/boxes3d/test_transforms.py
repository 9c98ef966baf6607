"""The box convention against golden values (``tests/golden/boxes.json``) and hand values; inverse transforms."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from w2r2_ds.boxes3d.transforms import (
    camera_to_world,
    camera_to_world_torch,
    corners,
    euler_angles_to_matrix,
    euler_angles_to_matrix_torch,
    matrix_to_euler_angles,
    world_to_camera,
)

HERE = Path(__file__).parent.parent / "golden" / "boxes.json"
OTHER = Path(os.environ.get("W2R2_GOLDEN", HERE.parent)) / "boxes.json"
LEVEL = np.array([[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])
"""A level camera that faces world +y."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((OTHER if OTHER.exists() else HERE).read_text())


def boxes(count: int, seed: int = 0) -> np.ndarray:
    """``[count, 9]`` random boxes, angles inside the canonical ranges."""
    draw = np.random.default_rng(seed)
    angles = draw.uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], (count, 3))
    return np.concatenate([draw.normal(size=(count, 3)), draw.uniform(0.1, 2, (count, 3)), angles], axis=1)


def poses(count: int, seed: int = 1) -> np.ndarray:
    """``[count, 4, 4]`` random rigid transforms."""
    result = np.tile(np.eye(4), (count, 1, 1))
    for pose, box in zip(result, boxes(count, seed), strict=True):
        pose[:3, :3], pose[:3, 3] = euler_angles_to_matrix(box[6:]), box[:3]
    return result


@pytest.mark.golden
def test_rotations_match(golden: dict[str, Any]) -> None:
    for case in golden["rotations"]:
        matrix = np.array(case["matrix_intrinsic_ZXY"])
        np.testing.assert_allclose(euler_angles_to_matrix(np.array(case["angles"])), matrix, atol=1e-6)
        np.testing.assert_allclose(euler_angles_to_matrix(matrix_to_euler_angles(matrix)), matrix, atol=2e-6)


@pytest.mark.golden
def test_corners_match(golden: dict[str, Any]) -> None:
    for case in golden["pairs"]:
        for number in "12":
            box, expected = np.array(case[f"box{number}"]), np.array(case[f"corners{number}"])
            np.testing.assert_allclose(corners(box), expected, atol=1e-5)


@pytest.mark.golden
def test_transforms_match(golden: dict[str, Any]) -> None:
    for case in golden["transforms"]:
        extrinsic = np.array(case["axis_align_matrix"]) @ np.array(case["cam2global"])
        world, camera = np.array(case["box_world"]), np.array(case["box_cam_ZXY"])
        moved = world_to_camera(world, extrinsic)
        np.testing.assert_allclose(moved[:6], camera[:6], atol=1e-5)
        np.testing.assert_allclose(euler_angles_to_matrix(moved[6:]), case["rotation_cam"], atol=1e-5)
        np.testing.assert_allclose(euler_angles_to_matrix(moved[6:]), euler_angles_to_matrix(camera[6:]), atol=1e-5)
        np.testing.assert_allclose(corners(camera_to_world(camera, extrinsic)), case["corners_world"], atol=1e-5)


def test_angles_are_recovered_from_the_matrix() -> None:
    for box in boxes(100):
        np.testing.assert_allclose(matrix_to_euler_angles(euler_angles_to_matrix(box[6:])), box[6:], atol=1e-9)


def test_hand_computed_matrix_is_intrinsic() -> None:
    expected = [[0.783214, -0.272192, 0.559006], [0.437702, 0.879923, -0.184803], [-0.44158, 0.389418, 0.808307]]
    np.testing.assert_allclose(euler_angles_to_matrix(np.array([0.3, 0.4, 0.5])), expected, atol=1e-6)


@pytest.mark.parametrize("middle", [np.pi / 2, -np.pi / 2])
def test_gimbal_lock_gives_one_result_without_warnings(middle: float) -> None:
    sign = np.sign(middle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for last in (0.0, 0.9, -2.0):
            angles = matrix_to_euler_angles(euler_angles_to_matrix(np.array([0.4 - sign * last, middle, last])))
            np.testing.assert_allclose(angles, [0.4, middle, 0.0], atol=1e-9)


def test_rotation_round_trips_close_to_gimbal_lock() -> None:
    """The angles are not continuous there, but their rotation is."""
    for gap in np.logspace(-12, -1, 100):
        matrix = euler_angles_to_matrix(np.array([0.7, np.pi / 2 - gap, -1.1]))
        np.testing.assert_allclose(euler_angles_to_matrix(matrix_to_euler_angles(matrix)), matrix, atol=2e-6)


def test_hand_computed_camera_boxes() -> None:
    upright = world_to_camera(np.array([2, 5, 1, 0.8, 0.6, 1, 0, 0, 0.0]), LEVEL)
    np.testing.assert_allclose(upright, [1, 0.5, 3, 0.8, 0.6, 1, 0, np.pi / 2, 0], atol=1e-9)
    yawed = world_to_camera(np.array([2, 5, 1, 0.8, 0.6, 1, 0.5, 0, 0.0]), LEVEL)
    np.testing.assert_allclose(yawed, [1, 0.5, 3, 0.8, 0.6, 1, 1.5708, 1.0708, -1.5708], atol=1e-5)
    rounded = camera_to_world(np.round(yawed, 2), LEVEL)
    np.testing.assert_allclose(rounded[6:], [0.5008, 0, 0], atol=1e-3)


def test_camera_and_world_are_inverse() -> None:
    for box, pose in zip(boxes(50), poses(50), strict=True):
        np.testing.assert_allclose(camera_to_world(world_to_camera(box, pose), pose), box, atol=1e-8)


def test_torch_equals_numpy() -> None:
    single, transforms = boxes(20), poses(20)
    batch = torch.from_numpy(single)
    centre, size, rotation = camera_to_world_torch(batch, torch.from_numpy(transforms))
    for row, (box, pose) in enumerate(zip(single, transforms, strict=True)):
        moved = camera_to_world(box, pose)
        np.testing.assert_allclose(
            euler_angles_to_matrix_torch(batch[:, 6:])[row], euler_angles_to_matrix(box[6:]), atol=1e-12
        )
        np.testing.assert_allclose(torch.cat((centre, size), 1)[row], moved[:6], atol=1e-12)
        np.testing.assert_allclose(rotation[row], euler_angles_to_matrix(moved[6:]), atol=1e-9)


def test_torch_functions_on_meta_tensors() -> None:
    """They have no values: a host sync or a data-dependent shape would fail."""
    empty = torch.empty(3, 9, device="meta")
    assert camera_to_world_torch(empty, torch.empty(3, 4, 4, device="meta"))[2].shape == (3, 3, 3)


def test_torch_functions_are_differentiable() -> None:
    batch = torch.from_numpy(boxes(2)).requires_grad_()
    pose = torch.from_numpy(poses(2))
    assert torch.autograd.gradcheck(lambda value: camera_to_world_torch(value, pose), (batch,))


def test_wrong_shapes_and_poses_raise() -> None:
    with pytest.raises(ValueError, match=r"A box must have shape \(9,\), not \(7,\)"):
        corners(np.zeros(7))
    with pytest.raises(ValueError, match="cam_to_world must have shape"):
        camera_to_world(boxes(1)[0], np.eye(3))
    with pytest.raises(ValueError, match="no valid pose"):
        world_to_camera(boxes(1)[0], np.full((4, 4), -np.inf))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        matrix_to_euler_angles(np.eye(4))
