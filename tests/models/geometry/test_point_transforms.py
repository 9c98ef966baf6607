"""Changed geometry: points and boxes change alike in all coordinates, and moved cameras keep their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from w2r2_ds.boxes3d.transforms import corners, euler_angles_to_matrix, world_to_camera
from w2r2_ds.data.frames.projection import project
from w2r2_ds.models.geometry.point_transforms import Similarity, change_point_maps, world_change

BOX = np.array([1.0, 2.0, 0.5, 0.8, 0.6, 1.1, 0.4, 0.0, 0.0])
CHANGES = {
    "scale": world_change(scale=0.7),
    "shift": world_change(shift=(0.5, -1.0, 0.25)),
    "turn": world_change(turn=0.6),
    "all": world_change(1.4, (-2.0, 0.3, 0.1), -2.1, (3.0, 1.0, 0.7)),
}
FRAMES = 3


@pytest.fixture(params=CHANGES)
def change(request: pytest.FixtureRequest) -> Similarity:
    return CHANGES[request.param]


@pytest.fixture
def poses() -> np.ndarray:
    """``[frames, 4, 4]`` poses of tilted cameras."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    for pose in poses:
        pose[:3, :3], pose[:3, 3] = euler_angles_to_matrix(rng.uniform(-2, 2, 3)), rng.uniform(-3, 3, 3)
    return poses


def in_frame(points: np.ndarray, poses: np.ndarray, reference_frame: str) -> np.ndarray:
    """World points ``[frames, n, 3]`` in other coordinates."""
    origins = {"world": [np.eye(4)] * FRAMES, "camera": poses, "first": poses[[0] * 3], "last": poses[[-1] * 3]}
    return np.stack(
        [
            (each - pose[:3, 3]) @ np.linalg.inv(pose[:3, :3]).T
            for each, pose in zip(points, origins[reference_frame], strict=True)
        ]
    )


def test_numbers_by_hand() -> None:
    """A quarter turn counter-clockwise about (1, 0, 0), twice as large, then 0.5 m up."""
    change = world_change(2.0, (0, 0, 0.5), np.pi / 2, (1, 0, 0))
    points = torch.tensor([[1.0, 0, 0], [2, 0, 0], [1, 1, 1]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0, 0.5], [1, 2, 0.5], [-1, 0, 2.5]], dtype=torch.float64)
    torch.testing.assert_close(change.apply_points(points), expected, rtol=0, atol=1e-15)
    box = change.apply_box(np.array([2.0, 0, 0, 1, 2, 3, 0, 0, 0]))
    np.testing.assert_allclose(box, [1, 2, 0.5, 2, 4, 6, np.pi / 2, 0, 0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("reference_frame", ["world", "camera", "first", "last"])
@pytest.mark.parametrize("cameras_move", [False, True])
def test_points_of_a_box_are_those_of_the_changed_box(
    change: Similarity, poses: np.ndarray, reference_frame: str, cameras_move: bool
) -> None:
    """Corners of the box as points of every frame; the box in world coordinates and in every camera."""
    points = in_frame(np.tile(corners(BOX), (FRAMES, 1, 1)), poses, reference_frame)
    changed = change_point_maps(torch.from_numpy(points), change, poses, reference_frame, cameras_move).numpy()
    new_poses = np.stack([change.moved_pose(pose) for pose in poses]) if cameras_move else poses
    new_box = change.apply_box(BOX)
    expected = in_frame(np.tile(corners(new_box), (FRAMES, 1, 1)), new_poses, reference_frame)
    np.testing.assert_allclose(changed, expected, rtol=0, atol=1e-12)
    for pose, new_pose in zip(poses, new_poses, strict=True):
        in_camera = change.in_moved_camera() if cameras_move else change.in_camera(pose)
        box = in_camera.apply_box(world_to_camera(BOX, pose))
        np.testing.assert_allclose(corners(box), corners(world_to_camera(new_box, new_pose)), rtol=0, atol=1e-12)


def test_pixels_stay_for_moved_cameras_only(change: Similarity, poses: np.ndarray) -> None:
    intrinsic = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    points = corners(BOX)
    new_points = change.apply_points(torch.from_numpy(points)).numpy()
    for pose in poses:
        pixels, depths = project(points, pose, intrinsic)
        moved, new_depths = project(new_points, change.moved_pose(pose), intrinsic)
        np.testing.assert_allclose(moved, pixels, rtol=1e-9)
        np.testing.assert_allclose(new_depths, change.scale * depths, rtol=1e-12)
        assert np.abs(project(new_points, pose, intrinsic)[0] - pixels).max() > 1


def test_holes_and_dtype_stay(change: Similarity) -> None:
    points = torch.rand(2, 3, 4, 4, 3)
    points[1, 2, 3, 0] = torch.nan
    found = change.apply_points(points)
    assert found.dtype == torch.float32 and found.shape == points.shape
    assert torch.equal(found.isnan(), points.isnan())
    exact = change.apply_points(points.double()).float()
    assert torch.equal(found.nan_to_num(), exact.nan_to_num()), "computed in float64, rounded once"


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_a_scale_is_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        world_change(scale=scale)
