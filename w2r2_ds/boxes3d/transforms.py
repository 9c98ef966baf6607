"""Box convention of the project, and transforms of boxes between camera and world coordinates.

A box is nine numbers ``[cx, cy, cz, sx, sy, sz, a0, a1, a2]``: centre and size in metres, Euler angles in radians.
The angles are *intrinsic* ZXY, ``R = Rz(a0) Rx(a1) Ry(a2)``, both for labels and for decoding (VG-LLM's evaluator mixes
this with the extrinsic reading; see ``tests/golden/boxes.json``). Sizes belong to the box's own axes, so moving a box
never changes them. ``cam_to_world`` is a rigid ``[4, 4]`` transform from an OpenCV camera to the axis-aligned world.

The NumPy half works in float64 on single boxes (data, evaluation). The torch half is batched, differentiable, and never
waits for the GPU (the training step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GIMBAL_TOLERANCE = 1e-6
"""``cos(a1)`` below which the first and last axis count as one (see ``angles_from_matrix``)."""

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
"""Corners in units of the size, in the order of ``boxes.json`` (EmbodiedScan's, pytorch3d's)."""


def rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """``R = Rz(a0) Rx(a1) Ry(a2)``.

    Args:
        angles: ``[3]``, radians.

    Returns:
        ``[3, 3]`` float64.
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


def angles_from_matrix(rotation: np.ndarray) -> np.ndarray:
    """The ZXY angles of a rotation: a0 and a2 in (-pi, pi], a1 in [-pi/2, pi/2].

    At ``a1 = +-pi/2`` (a level camera that faces an upright box) only ``a0 +- a2`` is defined. There, that is for
    ``cos(a1) < GIMBAL_TOLERANCE``, a2 is 0 and a0 carries the whole turn, so equal rotations always get equal labels.
    The third angle is read after the first is undone, so that the product is exact however badly a0 is conditioned.

    Args:
        rotation: ``[3, 3]``, a rotation.

    Returns:
        ``[3]`` float64, radians.
    """
    r = np.asarray(rotation, dtype=np.float64)
    if r.shape != (3, 3):
        raise ValueError(f"A rotation has shape (3, 3), this one has {r.shape}.")
    cosine = float(np.hypot(r[0, 1], r[1, 1]))
    a1 = np.arctan2(r[2, 1], cosine)
    if cosine < GIMBAL_TOLERANCE:
        return np.array([np.arctan2(r[1, 0], r[0, 0]), a1, 0.0])
    a0 = np.arctan2(-r[0, 1], r[1, 1])
    c0, s0 = np.cos(a0), np.sin(a0)
    a2 = np.arctan2(c0 * r[0, 2] + s0 * r[1, 2], c0 * r[0, 0] + s0 * r[1, 0])
    return np.array([a0, a1, a2])


def world_to_camera(box9: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """A world box in the coordinates of one camera.

    Args:
        box9: ``[9]``, world.
        cam_to_world: ``[4, 4]``.

    Returns:
        ``[9]`` float64, camera.
    """
    return _moved(box9, np.linalg.inv(_transform(cam_to_world)))


def camera_to_world(box9: np.ndarray, cam_to_world: np.ndarray) -> np.ndarray:
    """A camera box in world coordinates; the inverse of ``world_to_camera``.

    Args:
        box9: ``[9]``, camera.
        cam_to_world: ``[4, 4]``.

    Returns:
        ``[9]`` float64, world.
    """
    return _moved(box9, _transform(cam_to_world))


def corners(box9: np.ndarray) -> np.ndarray:
    """The eight corners, in the order of ``CORNER_OFFSETS``.

    Args:
        box9: ``[9]``.

    Returns:
        ``[8, 3]`` float64, metres.
    """
    box = _vector(box9, 9, "A box")
    return (np.array(CORNER_OFFSETS) * box[3:6]) @ rotation_matrix(box[6:]).T + box[:3]


def rotation_matrix_torch(angles: Tensor) -> Tensor:
    """``rotation_matrix`` for a batch.

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
    """Camera boxes moved to the world as centre, size and rotation: no angles, so no gimbal lock and a clean gradient.

    ``boxes3d.iou.oriented_iou`` takes the three results.

    Args:
        boxes: ``[n, 9]`` floating point, camera.
        cam_to_world: ``[n, 4, 4]``; its dtype is widened or narrowed to that of ``boxes``.

    Returns:
        centre ``[n, 3]``, size ``[n, 3]``, rotation ``[n, 3, 3]``, of the dtype of ``boxes``.
    """
    transform = cam_to_world.to(boxes.dtype)
    turn, shift = transform[:, :3, :3], transform[:, :3, 3]
    centre = (turn @ boxes[:, :3, None]).squeeze(-1) + shift
    return centre, boxes[:, 3:6], turn @ rotation_matrix_torch(boxes[:, 6:])


def _moved(box9: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """``[9]`` box after a rigid ``[4, 4]`` transform."""
    box = _vector(box9, 9, "A box")
    turn, shift = transform[:3, :3], transform[:3, 3]
    angles = angles_from_matrix(turn @ rotation_matrix(box[6:]))
    return np.concatenate([turn @ box[:3] + shift, box[3:6], angles])


def _vector(values: np.ndarray, length: int, name: str) -> np.ndarray:
    """``[length]`` float64, checked; raises ValueError."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), not {vector.shape}.")
    return vector


def _transform(cam_to_world: np.ndarray) -> np.ndarray:
    """``[4, 4]`` float64, finite."""
    transform = np.asarray(cam_to_world, dtype=np.float64)
    if transform.shape != (4, 4):
        raise ValueError(f"cam_to_world must have shape (4, 4), not {transform.shape}.")
    if not np.isfinite(transform).all():
        raise ValueError("cam_to_world holds infinite or undefined numbers: the frame has no valid pose.")
    return transform
