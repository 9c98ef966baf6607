"""Attention anchors: the place that attention to the frames points at, a coarse 3D box there, and its similarity s.

The paper (arXiv 2510.17034, section 1) describes that 2D-biased models anchor on image regions and guess the 3D place
from them. Its text gives no formula; this file defines one. The box uses 2D knowledge only: the pixel with the highest
attention, the pose and intrinsics of its frame, and the typical depth and size of the training set
(`data/frames/typical_box.py`). All of it is tensor arithmetic on the device, without synchronization with the host and
without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w2r2_ds.boxes3d.iou import oriented_iou
from w2r2_ds.objective.similarity import center_size_rotation, frame_poses
from w2r2_ds.types.batch import Batch


@dataclass(frozen=True)
class Anchors:
    """The attention anchor of every sample of a batch, and the box at it.

    Attributes:
        token: ``[batch]`` int64, index of the anchored token among the visual tokens of the batch; 0 without frames.
        frame: ``[batch]`` int64, index of its frame among the frames of the sample.
        center: ``[batch, 3]`` float64, centre of the box in the world: the point of the token's ray at the typical
            depth.
        size: ``[batch, 3]`` float64, typical size; the box is aligned with the axes of the world.
        valid: ``[batch]`` bool, False for a sample without frames, without attention to them (no *where* tokens),
            without a pose of the frame, or without a box to compare with.
    """

    token: Tensor
    frame: Tensor
    center: Tensor
    size: Tensor
    valid: Tensor


@torch.no_grad()
def find_anchors(attention: Tensor, batch: Batch) -> Anchors:
    """Anchors of a batch with frames.

    The anchor is the visual token with the highest attention, not the mean of all positions: the mean of a diffuse map
    is near the middle of the image wherever the object is, and of a map with two peaks between both.

    Args:
        attention: ``[batch, visual tokens]`` attention to the visual tokens of the batch, as
            `VisualAttention.mean_map` returns it.
        batch: training batch with `Batch.anchors`.
    """
    inputs = batch.anchors
    assert inputs is not None, "the loader makes the inputs of anchors"
    # Packed samples share the visual tokens of their frame set; the tokens of other frame sets are excluded.
    is_own = batch.frame_set_of_token == batch.frame_set_of_sample[:, None]
    highest, token = attention.masked_fill(~is_own, 0.0).max(-1)
    frame, ray = inputs.frame[token], inputs.ray[token]
    pose, exists = frame_poses(batch.cam_to_world, frame)
    in_camera = inputs.depth[:, None] * ray
    center = (pose[:, :3, :3] @ in_camera[..., None]).squeeze(-1) + pose[:, :3, 3]
    valid = (highest > 0) & exists & inputs.depth.isfinite()
    return Anchors(token, frame, center, inputs.size, valid)


@torch.no_grad()
def anchor_similarity(attention: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """IoU3D of the boxes at the anchors with the labels' boxes, in the world.

    Args:
        attention: see `find_anchors`.
        batch: see `find_anchors`; may also be one without frames.

    Returns:
        s ``[batch]`` float64 in [0, 1], and valid ``[batch]`` bool (`Anchors.valid`); s is 0 for an invalid anchor.
    """
    if batch.visuals.dummy:  # a host value
        zeros = torch.zeros(len(batch.ids), dtype=torch.float64, device=batch.target_box.device)
        return zeros, zeros.bool()
    anchors = find_anchors(attention, batch)
    upright = torch.eye(3, dtype=torch.float64, device=attention.device).expand(len(anchors.center), 3, 3)
    iou = oriented_iou(anchors.center, anchors.size, upright, *center_size_rotation(batch.target_box))
    return torch.where(anchors.valid, iou, 0.0), anchors.valid
