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

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import (
    camera_to_world,
    camera_to_world_torch,
    corners,
    euler_angles_to_matrix,
    euler_angles_to_matrix_torch,
    matrix_to_euler_angles,
    nearest_heading,
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


def upright(count: int, seed: int = 2) -> np.ndarray:
    """``[count, 9]`` random axis-aligned boxes."""
    return boxes(count, seed) * np.array([1.0] * 6 + [0.0] * 3)


def quarter_turns(box: np.ndarray) -> list[np.ndarray]:
    """The four equal descriptions of an upright box."""
    swapped = box[[0, 1, 2, 4, 3, 5, 6, 7, 8]]
    turn = np.array([0.0] * 6 + [np.pi / 2, 0, 0])
    return [box, swapped + turn, box + 2 * turn, swapped + 3 * turn]


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float(box_iou(torch.from_numpy(first)[None], torch.from_numpy(second)[None]))


def test_nearest_heading_is_the_same_box_for_random_poses() -> None:
    """In the world and in the camera; which of the four descriptions is given does not matter."""
    turns = set()
    for box, pose in zip(upright(200), poses(200), strict=True):
        turned = nearest_heading(box, pose)
        assert iou(turned, box) == pytest.approx(1, abs=1e-6)
        assert iou(world_to_camera(turned, pose), world_to_camera(box, pose)) == pytest.approx(1, abs=1e-6)
        x_axis, forward = euler_angles_to_matrix(turned[6:])[:, 0], pose[:3, 2]
        heading = np.array([forward[0], forward[1], 0]) / np.hypot(forward[0], forward[1])
        assert x_axis @ heading >= np.sqrt(0.5) - 1e-9  # at most 45 degrees apart
        quarter = round(turned[6] / (np.pi / 2))
        np.testing.assert_array_equal(turned[3:6], box[[4, 3, 5]] if quarter % 2 else box[3:6])
        turns.add(quarter % 4)
        for other in quarter_turns(box):
            again = nearest_heading(other, pose)
            np.testing.assert_allclose(again[:6], turned[:6], atol=1e-12)
            np.testing.assert_allclose(
                euler_angles_to_matrix(again[6:]), euler_angles_to_matrix(turned[6:]), atol=1e-12
            )
    assert turns == {0, 1, 2, 3}


def test_angles_of_the_nearest_heading_vary_less() -> None:
    """Cameras look up to 50 degrees down, with 5 degrees of roll; docs/reference/data-formats.md has the values."""
    draw = np.random.default_rng(0)
    spread: list[tuple[np.ndarray, np.ndarray]] = []
    for number, box in enumerate(upright(1000)):
        yaw, pitch, roll = draw.uniform(-np.pi, np.pi), np.radians(draw.uniform(0, 50)), np.radians(draw.normal() * 5)
        # R = Rz(yaw) Ry(pitch) Rx(roll) of a camera with x forward and z up, then OpenCV's axes.
        rotation = euler_angles_to_matrix([yaw, 0, pitch]) @ euler_angles_to_matrix([0, roll, 0])
        pose = np.eye(4)
        pose[:3, :3] = rotation @ np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        nearest = nearest_heading(box, pose)
        assert number % 10 or iou(box, nearest) == pytest.approx(1, abs=1e-6)  # an IoU takes a millisecond
        spread.append((world_to_camera(box, pose)[6:], world_to_camera(nearest, pose)[6:]))
    before, after = np.array(spread).std(axis=0)
    assert before == pytest.approx([1.7, 0.8, 2.3], abs=0.1) and after == pytest.approx([0.2, 0.4, 0.3], abs=0.1)
    assert np.abs(np.array(spread)[:, 1, 1]).max() < np.radians(50)  # far from the gimbal lock at 90 degrees


def test_nearest_heading_by_hand() -> None:
    """A camera that faces +y: the box's x axis is turned there, its old x side is now its y side."""
    turned = nearest_heading(np.array([2, 5, 1, 0.8, 0.6, 1.0, 0, 0, 0]), LEVEL)
    np.testing.assert_allclose(turned, [2, 5, 1, 0.6, 0.8, 1.0, np.pi / 2, 0, 0])
    # In the camera: x axis forward, y axis left, z axis up, so R = Rz(90) Ry(-90) and a1 = 0.
    np.testing.assert_allclose(world_to_camera(turned, LEVEL)[6:], [np.pi / 2, 0, -np.pi / 2], atol=1e-12)
    down = np.diag([1.0, -1.0, -1.0, 1.0])  # the optical axis has no heading
    box = np.array([2, 5, 1, 0.8, 0.6, 1.0, 0, 0, 0])
    np.testing.assert_array_equal(nearest_heading(box, down), box)


def test_nearest_heading_needs_an_upright_box() -> None:
    with pytest.raises(ValueError, match="tilted"):
        nearest_heading(np.array([2, 5, 1, 0.8, 0.6, 1.0, 0, 0.1, 0]), LEVEL)
    with pytest.raises(ValueError, match="not finite"):
        nearest_heading(np.array([2, 5, 1, 0.8, 0.6, 1.0, 0, 0, 0]), np.full((4, 4), np.nan))
