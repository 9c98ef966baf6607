"""Scale, shift and turn the geometry of a scene: points, the boxes in the same coordinates, and camera poses.

The pixels stay as they are. Two uses: measure how far the answers of a model follow its geometry when only that
changes, and train on such changes (augmentation).

A `Similarity` of the world applies to data in world coordinates as it is. In camera coordinates there are two cases:

* *The cameras move along* (`in_moved_camera`, `moved_pose`). Every pixel stays right. Camera coordinates show the scale
  only.
* *The cameras stay* (`in_camera`). The objects move in the view, and the pixels no longer show where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2r2_ds.boxes3d.transforms import euler_angles_to_matrix, matrix_to_euler_angles

AXIS_TOLERANCE = 1e-9
"""Largest error of a sine or cosine of a multiple of 90 degrees, computed in float64 (some 1e-16)."""


@dataclass(frozen=True, eq=False)
class Similarity:
    """``p -> scale * rotation @ p + shift``; see `world_change`.

    Attributes:
        scale: positive factor.
        rotation: ``[3, 3]`` float64 rotation matrix.
        shift: ``[3]`` float64, metres.
    """

    scale: float
    rotation: np.ndarray
    shift: np.ndarray

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"The scale is {self.scale}; it must be positive.")

    def apply_points(self, points: Tensor) -> Tensor:
        """Transform points ``[..., 3]`` in metres; NaN (no measured depth) stays NaN.

        Returns:
            A new tensor of the same shape and dtype, computed in float64.
        """
        rotation, shift = (torch.from_numpy(value).to(points.device) for value in (self.rotation, self.shift))
        return (self.scale * points.double() @ rotation.T + shift).to(points.dtype)

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """Transform a box ``[9]`` (centre, size, ZXY angles) in the same coordinates; returns float64.

        An axis-aligned box stays axis-aligned only for turns by multiples of 90 degrees.
        """
        values = np.asarray(box, dtype=np.float64)
        angles = matrix_to_euler_angles(self.rotation @ euler_angles_to_matrix(values[6:]))
        return np.concatenate([self.scale * self.rotation @ values[:3] + self.shift, self.scale * values[3:6], angles])

    def apply_aligned_box(self, box: np.ndarray) -> np.ndarray:
        """Transform an axis-aligned box ``[6]`` (centre, size) in the same coordinates; returns float64.

        Raises:
            ValueError: the turn is not a multiple of 90 degrees, so the box would not stay axis-aligned.
        """
        values, axes = np.asarray(box, dtype=np.float64), np.abs(self.rotation)
        if np.abs(axes - axes.round()).max() > AXIS_TOLERANCE:
            raise ValueError("An axis-aligned box can only be turned by multiples of 90 degrees.")
        center = self.scale * self.rotation @ values[:3] + self.shift
        return np.concatenate([center, self.scale * axes.round() @ values[3:]])

    def in_camera(self, cam_to_world: np.ndarray) -> Similarity:
        """The same change of the world, in the coordinates of a camera ``[4, 4]`` that stays."""
        rotation, centre = cam_to_world[:3, :3], cam_to_world[:3, 3]
        # Camera to world, change, world to camera: R^-1 (s Q (R p + c) + t - c).
        shift = rotation.T @ (self.scale * self.rotation @ centre + self.shift - centre)
        return Similarity(self.scale, rotation.T @ self.rotation @ rotation, shift)

    def in_moved_camera(self) -> Similarity:
        """The same change of the world, in the coordinates of any camera that moves along: its scale."""
        return Similarity(self.scale, np.eye(3), np.zeros(3))

    def moved_pose(self, cam_to_world: np.ndarray) -> np.ndarray:
        """``[4, 4]`` float64 pose of a camera that moves along; it is rigid, the scale is in its position only."""
        pose = np.array(cam_to_world, dtype=np.float64)
        pose[:3, :3] = self.rotation @ pose[:3, :3]
        pose[:3, 3] = self.scale * self.rotation @ pose[:3, 3] + self.shift
        return pose


def world_change(
    scale: float = 1.0,
    shift: Sequence[float] = (0.0, 0.0, 0.0),
    turn: float = 0.0,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
) -> Similarity:
    """A change of a world with +z up: scale and turn about `origin`, then shift.

    Args:
        scale: positive factor.
        shift: x, y and z in metres.
        turn: angle about the vertical axis in radians, counter-clockwise from above.
        origin: point that scale and turn leave where it is, metres.

    Raises:
        ValueError: the scale is not positive.
    """
    rotation, centre = euler_angles_to_matrix(np.array([turn, 0.0, 0.0])), np.asarray(origin, dtype=np.float64)
    return Similarity(scale, rotation, np.asarray(shift, dtype=np.float64) + centre - scale * rotation @ centre)


def change_point_maps(
    points: Tensor, change: Similarity, cam_to_world: np.ndarray, reference_frame: str, cameras_move: bool
) -> Tensor:
    """Apply a change of the world to the point maps of a sample.

    Args:
        points: ``[frames, ..., 3]`` in the coordinates of `reference_frame`, metres.
        change: change of the world.
        cam_to_world: ``[frames, 4, 4]`` camera poses before the change; only used if the cameras stay.
        reference_frame: ``world``, ``camera``, ``first`` or ``last`` (`PointMapSpec`).
        cameras_move: whether the cameras move along with the world.

    Returns:
        The changed points in the coordinates of the same `reference_frame`, of the same shape and dtype.
    """
    if reference_frame == "world":
        return change.apply_points(points)
    if cameras_move:
        return change.in_moved_camera().apply_points(points)
    if reference_frame == "camera":
        return torch.stack(
            [change.in_camera(pose).apply_points(p) for p, pose in zip(points, cam_to_world, strict=True)]
        )
    return change.in_camera(cam_to_world[{"first": 0, "last": -1}[reference_frame]]).apply_points(points)
