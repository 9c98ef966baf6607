"""Cameras of VGGT: pose encoding, intrinsics and extrinsics, and points of depth maps.

A pose encoding has nine numbers per frame: translation (3) and rotation (quaternion x, y, z, w) of the transform from
world to camera, and the vertical and the horizontal field of view in radians (section 3.1 of arXiv 2503.11651; the
public code adds a second field of view). Cameras follow OpenCV (x right, y down, z forward), the principal point is the
centre of the image, and the centre of pixel ``(row, column)`` has these integers as coordinates.
"""

from __future__ import annotations

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

POSE_SIZE = 9
"""Numbers of a pose encoding."""


def decode_pose(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Camera matrices of pose encodings.

    Args:
        encoding: ``[..., 9]``; the quaternion need not have length 1. A field of view of 0 gives an infinite focal
            length.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        Intrinsics ``[..., 3, 3]`` in pixels and transforms from world to camera ``[..., 3, 4]``.
    """
    translation, quaternion, field_of_view = encoding.split((3, 4, 2), dim=-1)
    world_to_camera = torch.cat((_rotation_matrix(quaternion), translation[..., None]), dim=-1)
    centre = encoding.new_tensor((height / 2, width / 2))
    focal_y, focal_x = (centre / (field_of_view / 2).tan()).unbind(-1)
    intrinsics = encoding.new_zeros(*encoding.shape[:-1], 3, 3)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = focal_x, focal_y
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1.0
    return intrinsics, world_to_camera


def encode_pose(intrinsics: Tensor, world_to_camera: Tensor, height: int, width: int) -> Tensor:
    """Pose encodings of camera matrices, without gradient; the inverse of `decode_pose`.

    The principal point is not encoded. Quaternions have length 1 and ``w >= 0``.

    Args:
        intrinsics: ``[..., 3, 3]`` in pixels.
        world_to_camera: ``[..., 3, 4]``.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        ``[..., 9]`` in the dtype and on the device of `world_to_camera`.
    """
    rotation, translation = world_to_camera.detach().split((3, 1), dim=-1)
    quaternion = Rotation.from_matrix(rotation.reshape(-1, 3, 3).double().cpu().numpy()).as_quat(canonical=True)
    focal = intrinsics.detach().diagonal(dim1=-2, dim2=-1)[..., [1, 0]]
    field_of_view = 2 * (focal.new_tensor((height / 2, width / 2)) / focal).atan()
    parts = (translation[..., 0], torch.from_numpy(quaternion).reshape(*rotation.shape[:-2], 4), field_of_view)
    return torch.cat([part.to(world_to_camera) for part in parts], dim=-1)


def camera_to_world(world_to_camera: Tensor) -> Tensor:
    """Inverse ``[..., 4, 4]`` of rigid transforms ``[..., 3, 4]``."""
    rotation, translation = world_to_camera.split((3, 1), dim=-1)
    inverse = rotation.mT
    last_row = torch.eye(4, dtype=rotation.dtype, device=rotation.device)[3:].expand(*rotation.shape[:-2], 1, 4)
    return torch.cat((torch.cat((inverse, -inverse @ translation), dim=-1), last_row), dim=-2)


def unproject_depth(depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> Tensor:
    """World coordinates of the pixels of depth maps. A pixel of depth 0 is at the camera's centre.

    Args:
        depth: ``[..., H, W]``, z coordinates in the camera's frame.
        intrinsics: ``[..., 3, 3]`` in pixels, without skew.
        world_to_camera: ``[..., 3, 4]``.

    Returns:
        ``[..., H, W, 3]`` in the unit of `depth`.
    """
    height, width = depth.shape[-2:]
    row = torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None]
    column = torch.arange(width, dtype=depth.dtype, device=depth.device)
    focal_x, focal_y, centre_x, centre_y = (
        intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))
    )
    camera = torch.stack(((column - centre_x) / focal_x * depth, (row - centre_y) / focal_y * depth, depth), dim=-1)
    rotation, translation = world_to_camera[..., None, None, :, :].split((3, 1), dim=-1)
    # x_camera = R x_world + t, so that x_world = R^T (x_camera - t).
    return (rotation.mT @ (camera[..., None] - translation))[..., 0]


def _rotation_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]`` (x, y, z, w) of any length above 0."""
    x, y, z, w = (quaternion / torch.linalg.vector_norm(quaternion, dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
