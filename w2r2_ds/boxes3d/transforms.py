"""Box convention of the project, and transforms of boxes between camera and world coordinates.

A box is nine numbers ``[cx, cy, cz, sx, sy, sz, a0, a1, a2]``: centre and size in metres, Euler angles in radians.
The angles are *intrinsic* ZXY, ``R = Rz(a0) Rx(a1) Ry(a2)``, both for labels and for decoding (VG-LLM's evaluator mixes
them with extrinsic angles; see ``tests/golden/boxes.json``). Sizes are along the box's own axes, so a rigid transform
does not change them. ``cam_to_world`` is a rigid ``[4, 4]`` transform from an OpenCV camera to the axis-aligned world.

The NumPy functions work in float64 on single boxes (data, evaluation). The torch functions are batched and
differentiable, without host syncs (training step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GIMBAL_TOLERANCE = 1e-6
"""``cos(a1)`` below which the axes of a0 and a2 are treated as parallel (see ``matrix_to_euler_angles``)."""

CORNER_OFFSETS = (
    (-0.5, -0.5, -0.5),
    (-0.5, -0.5, 0.5),
    (-0.5, 0.5, 0.5),
    (-0.5, 0.5, -0.5),
    (0.5, -0.5, -0.5),
    (0.5, -0.5, 0.5),
    (0.5, 0.5, 0.5),
    (0.5, 0.5, -0.5),
)
"""Corners in units of the size, in the order of EmbodiedScan and pytorch3d."""


def euler_angles_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix of ZXY angles, ``R = Rz(a0) Rx(a1) Ry(a2)``.

    Args:
        angles: ``[3]``, radians.

    Returns:
        ``[3, 3]`` float64, from the axes of the box to the coordinate system of its centre.

    Raises:
        ValueError: the angles have another shape.
    """
    values = _vector(angles, 3, "angles")
    (c0, c1, c2), (s0, s1, s2) = np.cos(values), np.sin(values)
    return np.array(
        [
            [c0 * c2 - s0 * s1 * s2, -s0 * c1, c0 * s2 + s0 * s1 * c2],
            [s0 * c2 + c0 * s1 * s2, c0 * c1, s0 * s2 - c0 * s1 * c2],
            [-c1 * s2, s1, c1 * c2],
        ]
    )


def matrix_to_euler_angles(rotation: np.ndarray) -> np.ndarray:
    """ZXY angles of a rotation matrix: a0 and a2 in (-pi, pi], a1 in [-pi/2, pi/2].

    At ``a1 = +-pi/2`` (gimbal lock; for example an upright box in the coordinates of a level camera that looks along
    the box's y axis), only ``a0 +- a2`` is defined. For ``cos(a1) < GIMBAL_TOLERANCE``, a2 is therefore set to 0, so
    that equal rotations get equal labels.

    Args:
        rotation: ``[3, 3]`` rotation matrix.

    Returns:
        ``[3]`` float64, radians.

    Raises:
        ValueError: the matrix has another shape.
    """
    r = np.asarray(rotation, dtype=np.float64)
    if r.shape != (3, 3):
        raise ValueError(f"A rotation must have shape (3, 3), not {r.shape}.")
    cosine = float(np.hypot(r[0, 1], r[1, 1]))
    a1 = np.arctan2(r[2, 1], cosine)
    if cosine < GIMBAL_TOLERANCE:
        return np.array([np.arctan2(r[1, 0], r[0, 0]), a1, 0.0])
    a0 = np.arctan2(-r[0, 1], r[1, 1])
    # a2 is computed from Rz(a0)^-1 R, not from R: near the gimbal lock a0 is ill-conditioned, and a2 then compensates
    # its error, so that the product of the three rotations is exact.
    c0, s0 = np.cos(a0), np.sin(a0)
    a2 = np.arctan2(c0 * r[0, 2] + s0 * r[1, 2], c0 * r[0, 0] + s0 * r[1, 0])
    return np.array([a0, a1, a2])


def world_to_camera(box: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """Transform a box from world to camera coordinates.

    Args:
        box: ``[9]`` box in world coordinates.
        cam_to_world: ``[4, 4]`` camera pose.

    Returns:
        ``[9]`` float64 box in camera coordinates.

    Raises:
        ValueError: box or pose has another shape, or the pose is not finite.
    """
    return _transform_box(box, np.linalg.inv(_check_pose(cam_to_world)))


def camera_to_world(box: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """Transform a box from camera to world coordinates; the inverse of ``world_to_camera``.

    Args:
        box: ``[9]`` box in camera coordinates.
        cam_to_world: ``[4, 4]`` camera pose.

    Returns:
        ``[9]`` float64 box in world coordinates.

    Raises:
        ValueError: box or pose has another shape, or the pose is not finite.
    """
    return _transform_box(box, _check_pose(cam_to_world))


def nearest_heading(box: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """The description of an upright box whose x axis is nearest to the heading of a camera.

    An upright box has four equal descriptions: every quarter turn about the vertical exchanges the first two sizes.
    The yaw of the result differs from the heading, the horizontal direction of the optical axis, by at most 45 degrees.
    It does not depend on which description is given. In the coordinates of a camera without roll, a1 of the result is
    therefore in [-pi/4, pi/4], far from the gimbal lock. If the optical axis is vertical, the yaw is within 45 degrees
    of 0.

    Args:
        box: ``[9]`` box in world coordinates, with the angles (yaw, 0, 0).
        cam_to_world: ``[4, 4]`` camera pose.

    Returns:
        ``[9]`` float64, the same box in world coordinates.

    Raises:
        ValueError: box or pose has another shape, the box is tilted, or the pose is not finite.
    """
    values, forward = _vector(box, 9, "A box"), _check_pose(cam_to_world)[:3, 2]
    if values[7:].any():
        raise ValueError(f"The box is tilted: its angles are {values[6:].tolist()}, not (yaw, 0, 0).")
    heading = np.arctan2(forward[1], forward[0])
    turns = round((heading - values[6]) / (np.pi / 2))
    size = values[[4, 3, 5]] if turns % 2 else values[3:6]
    return np.concatenate([values[:3], size, [values[6] + turns * np.pi / 2, 0.0, 0.0]])


def corners(box: np.ndarray) -> np.ndarray:
    """Corners of a box, in the order of ``CORNER_OFFSETS``.

    Args:
        box: ``[9]`` box.

    Returns:
        ``[8, 3]`` float64, metres.

    Raises:
        ValueError: the box has another shape.
    """
    values = _vector(box, 9, "A box")
    return (np.array(CORNER_OFFSETS) * values[3:6]) @ euler_angles_to_matrix(values[6:]).T + values[:3]


def euler_angles_to_matrix_torch(angles: Tensor) -> Tensor:
    """``euler_angles_to_matrix`` of a batch of angles.

    Args:
        angles: ``[n, 3]`` floating point, radians.

    Returns:
        ``[n, 3, 3]`` of the same dtype.
    """
    import torch  # not at the top: `--help` of a command must not wait for it

    c0, c1, c2 = angles.cos().unbind(-1)
    s0, s1, s2 = angles.sin().unbind(-1)
    rows = (
        (c0 * c2 - s0 * s1 * s2, -s0 * c1, c0 * s2 + s0 * s1 * c2),
        (s0 * c2 + c0 * s1 * s2, c0 * c1, s0 * s2 - c0 * s1 * c2),
        (-c1 * s2, s1, c1 * c2),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def camera_to_world_torch(boxes: Tensor, cam_to_world: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transform boxes from camera to world coordinates.

    The result has rotation matrices instead of angles: the gradient of angles is unbounded at the gimbal lock.
    ``boxes3d.iou.oriented_iou`` takes the three results as arguments.

    Args:
        boxes: ``[n, 9]`` floating point boxes in camera coordinates.
        cam_to_world: ``[n, 4, 4]`` camera poses, converted to the dtype of ``boxes``.

    Returns:
        centre ``[n, 3]``, size ``[n, 3]`` and rotation ``[n, 3, 3]``, of the dtype of ``boxes``.
    """
    pose = cam_to_world.to(boxes.dtype)
    rotation, translation = pose[:, :3, :3], pose[:, :3, 3]
    centre = (rotation @ boxes[:, :3, None]).squeeze(-1) + translation
    return centre, boxes[:, 3:6], rotation @ euler_angles_to_matrix_torch(boxes[:, 6:])


def _transform_box(box: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """``[9]`` box after a rigid ``[4, 4]`` transform."""
    values = _vector(box, 9, "A box")
    rotation, translation = transform[:3, :3], transform[:3, 3]
    angles = matrix_to_euler_angles(rotation @ euler_angles_to_matrix(values[6:]))
    return np.concatenate([rotation @ values[:3] + translation, values[3:6], angles])


def _vector(values: np.ndarray, length: int, name: str) -> np.ndarray:
    """The values as ``[length]`` float64; raises ValueError for another shape."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), not {vector.shape}.")
    return vector


def _check_pose(cam_to_world: np.ndarray) -> np.ndarray:
    """The pose as ``[4, 4]`` float64; raises ValueError for another shape or numbers that are not finite."""
    pose = np.asarray(cam_to_world, dtype=np.float64)
    if pose.shape != (4, 4):
        raise ValueError(f"cam_to_world must have shape (4, 4), not {pose.shape}.")
    if not np.isfinite(pose).all():
        raise ValueError("cam_to_world is not finite: the frame has no valid pose.")
    return pose
