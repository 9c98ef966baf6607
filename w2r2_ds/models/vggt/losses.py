"""Losses to train a VGGT: camera, depth and points (section 3.4 of arXiv 2503.11651, Eq. 2 without tracks).

The loss is ``L_camera + L_depth + L_pmap``. Targets are expressed in the frame of the first camera and divided by the
mean distance of the scene's points from it. Predictions are not normalised, so that the model learns this scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from w2r2_ds.models.vggt.cameras import camera_to_world, encode_pose, unproject_depth
from w2r2_ds.models.vggt.predictions import HeadOutputs

HUBER_THRESHOLD = 0.1
"""Error of a number of the pose encoding above which the camera loss is linear."""
ITERATION_DECAY = 0.6
"""Weight of an iteration of the camera head relative to the next one."""
CONFIDENCE_WEIGHT = 0.2
"""The factor alpha of the logarithm of the confidence; the value of DUSt3R (arXiv 2312.14132, Eq. 4)."""


@dataclass(frozen=True)
class VGGTTargets:
    """Ground truth of a batch of scenes, in the frame of each first camera, in units of `scale`.

    Attributes:
        pose_encoding: ``[B, S, 9]`` (`models/vggt/cameras.py`); that of frame 0 is no translation and no rotation.
        depth: ``[B, S, H, W]``, 0 where it is unknown.
        points: ``[B, S, H, W, 3]``.
        valid: ``[B, S, H, W]`` bool, pixels with a known depth.
        scale: ``[B]``, mean distance of the scene's valid points from the first camera, in the unit of the input.
    """

    pose_encoding: Tensor
    depth: Tensor
    points: Tensor
    valid: Tensor
    scale: Tensor


@dataclass(frozen=True)
class VGGTLoss:
    """Parts of the loss, scalars.

    Attributes:
        camera: error of the pose encodings.
        depth: error of the depth maps, weighted by confidence.
        points: error of the point maps, weighted by confidence.
    """

    camera: Tensor
    depth: Tensor
    points: Tensor

    @property
    def total(self) -> Tensor:
        """The sum; the paper found that these parts need no weights."""
        return self.camera + self.depth + self.points


def make_targets(depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> VGGTTargets:
    """Ground truth from depth maps and cameras, normalised as in section 3.4 ("Ground truth coordinate normalization").

    Args:
        depth: ``[B, S, H, W]``, z coordinates in each camera's frame; 0, negative or not finite where unknown.
        intrinsics: ``[B, S, 3, 3]`` in pixels. A pose encoding has no principal point: `points` contains its offset
            from the centre of the image, but `pose_encoding` does not. Crop images so that it is near the centre.
        world_to_camera: ``[B, S, 3, 4]``, rigid, from any world in the unit of `depth`.

    Raises:
        ValueError: a scene has no pixel with a known depth.
    """
    height, width = depth.shape[-2:]
    valid = depth.isfinite() & (depth > 0)
    if not valid.flatten(1).any(1).all():
        raise ValueError("VGGT targets: a scene has no pixel with a depth above 0; skip such scenes.")
    depth = torch.where(valid, depth, 0)
    from_first = world_to_camera @ camera_to_world(world_to_camera[:, :1])
    points = unproject_depth(depth, intrinsics, from_first)
    distance = torch.linalg.vector_norm(points, dim=-1)
    scale = torch.where(valid, distance, 0).flatten(1).sum(1) / valid.flatten(1).sum(1)
    encoding = encode_pose(intrinsics, from_first, height, width)
    encoding = torch.cat((encoding[..., :3] / scale[:, None, None], encoding[..., 3:]), dim=-1)
    return VGGTTargets(
        encoding, depth / scale[:, None, None, None], points / scale[:, None, None, None, None], valid, scale
    )


def vggt_loss(outputs: HeadOutputs, targets: VGGTTargets) -> VGGTLoss:
    """The three parts of the loss, differentiable in all outputs."""
    return VGGTLoss(
        camera=camera_loss(outputs.pose_encodings, targets.pose_encoding),
        depth=confidence_loss(
            outputs.depth[..., None], outputs.depth_confidence, targets.depth[..., None], targets.valid
        ),
        points=confidence_loss(outputs.points, outputs.point_confidence, targets.points, targets.valid),
    )


def camera_loss(pose_encodings: Tensor, target: Tensor) -> Tensor:
    """L_camera: Huber loss of the pose encodings, divided by its threshold (slope 1 for large errors).

    Every iteration of the camera head is supervised, with weights that grow geometrically to 1 for the last one, as in
    RAFT (arXiv 2003.12039, Eq. 7): no gradient flows from one iteration to an earlier one.

    Args:
        pose_encodings: ``[iterations, B, S, 9]``.
        target: ``[B, S, 9]``.

    Returns:
        Weighted sum over iterations of the mean over frames and numbers.
    """
    error = F.smooth_l1_loss(pose_encodings, target.expand_as(pose_encodings), reduction="none", beta=HUBER_THRESHOLD)
    iterations = len(pose_encodings)
    weights = ITERATION_DECAY ** torch.arange(iterations - 1, -1, -1, dtype=error.dtype, device=error.device)
    return weights @ error.flatten(1).mean(1)


def confidence_loss(prediction: Tensor, confidence: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """L_depth or L_pmap: errors of values and of their gradients in the image, weighted by the predicted confidence.

    With confidence ``c`` and error ``e = prediction - target``: ``||c * e|| + ||c * grad e|| - alpha log c``. A
    gradient is the difference of a pixel and its right or lower neighbour, with the confidence of the first of the two,
    where both are valid. Each term is a mean over its pixels, so that the loss does not depend on the size of images.

    Args:
        prediction: ``[B, S, H, W, C]``.
        confidence: ``[B, S, H, W]``, above 0.
        target: ``[B, S, H, W, C]``, finite.
        valid: ``[B, S, H, W]`` bool.
    """
    error = prediction - target
    norm = torch.linalg.vector_norm(error, dim=-1)
    loss = _mean(confidence * norm - CONFIDENCE_WEIGHT * confidence.log(), valid)
    for axis in (2, 3):  # lower and right neighbours
        count = error.shape[axis] - 1
        both = valid.narrow(axis, 0, count) & valid.narrow(axis, 1, count)
        change = torch.linalg.vector_norm(error.diff(dim=axis), dim=-1)
        loss = loss + _mean(confidence.narrow(axis, 0, count) * change, both)
    return loss


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where `mask` is true; 0 if it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
