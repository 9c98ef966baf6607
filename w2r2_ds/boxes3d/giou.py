"""Generalised IoU (GIoU) of oriented boxes; it also has a gradient for disjoint boxes.

    GIoU = IoU - (C - union) / C

with C the volume of the smallest enclosing box (H. Rezatofighi et al., "Generalized Intersection over Union", CVPR
2019). For two oriented boxes, the smallest enclosing box has no closed form, and its orientation is not continuous.
Here C is the volume of the smallest enclosing box *along the axes of the second box*, the target. It equals the usual C
if both boxes have the same axes, such as axis-aligned boxes. For other pairs GIoU is not symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.boxes3d.iou import Pairs, box_parts, intersection_volume, product, ratio, result_dtype, unit_pairs

FARTHEST = 1e50
"""Largest offset of the centres, in units of the largest side, that GIoU distinguishes, so that C squared is finite."""


def box_giou(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Oriented IoU and GIoU of the boxes with the same index in two batches.

    Args:
        boxes_a: ``[n, 9]`` floating point (see ``boxes3d/transforms.py``), in any coordinate system.
        boxes_b: ``[n, 9]`` in the same coordinate system; the enclosing box has their axes.

    Returns:
        IoU ``[n]`` and GIoU ``[n]``; see ``oriented_giou``.
    """
    iou, giou = oriented_giou(*box_parts(boxes_a, boxes_b))
    dtype = result_dtype(boxes_a, boxes_b)
    return iou.to(dtype), giou.to(dtype)


def oriented_giou(
    centre_a: Tensor, size_a: Tensor, rotation_a: Tensor, centre_b: Tensor, size_b: Tensor, rotation_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact oriented IoU and GIoU of n pairs of boxes, computed in float64 from one intersection.

    A pair with a size that is not positive, or with a number that is not finite, has IoU 0, GIoU -1 and gradient 0.

    Args:
        centre_a, centre_b: ``[n, 3]`` metres.
        size_a, size_b: ``[n, 3]`` metres, along the columns of the rotations.
        rotation_a, rotation_b: ``[n, 3, 3]`` rotations from box axes to the common coordinate system.

    Returns:
        IoU ``[n]`` in [0, 1] and GIoU ``[n]`` in [-1, IoU]; float64 if all inputs are, else float32.
    """
    inputs = (centre_a, size_a, rotation_a, centre_b, size_b, rotation_b)
    pairs = unit_pairs(*inputs)
    intersection = intersection_volume(pairs)
    union = pairs.volumes - intersection
    iou = ratio(intersection, union, pairs.valid)
    # Rounding may make the enclosing box of identical boxes smaller than their union.
    enclosing = torch.maximum(_enclosing_volume(pairs), union)
    giou = iou - (1 - ratio(union, enclosing, pairs.valid))
    dtype = result_dtype(*inputs)
    return iou.to(dtype), giou.to(dtype)


def _enclosing_volume(pairs: Pairs) -> Tensor:
    """Volume ``[n]`` of the smallest box that encloses both boxes and has the axes of the second."""
    # In the axes of box b with its centre as the origin, box b extends from -size_b / 2 to size_b / 2. The half extent
    # of box a along each of these axes is |R_b^T R_a| size_a / 2.
    to_b = pairs.rotation_b.transpose(1, 2)
    centre = -(to_b @ pairs.offset.clamp(-FARTHEST, FARTHEST)[..., None]).squeeze(-1)
    half_extent = ((to_b @ pairs.rotation_a).abs() @ pairs.size_a[..., None]).squeeze(-1) / 2
    low = torch.minimum(centre - half_extent, -pairs.size_b / 2)
    high = torch.maximum(centre + half_extent, pairs.size_b / 2)
    return product(high - low)
