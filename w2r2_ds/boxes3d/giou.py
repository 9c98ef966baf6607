"""Generalised IoU (GIoU) of oriented boxes; has a gradient for disjoint boxes, too.

    GIoU = IoU - (C - union) / C

(H. Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019), with C the smallest enclosing box. Around two
oriented boxes it has no closed form, and its orientation jumps. C is therefore the smallest box *along the axes of the
second box*, the target. It equals the usual C where the axes agree, as for axis-aligned pairs, and turns with the
target. For other pairs GIoU is not symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.boxes3d.iou import Pairs, box_parts, common_volume, product, ratio, result_dtype, unit_pairs

FARTHEST = 1e50
"""Offset of the centres, in units of the largest side, beyond which GIoU no longer falls: C squared stays finite."""


def box_giou(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Oriented IoU and GIoU of box i of the one batch and box i of the other.

    Args:
        boxes_a: ``[n, 9]`` floating point (see ``boxes3d/transforms.py``), any one frame of reference.
        boxes_b: ``[n, 9]`` in the same frame of reference; the hull has their axes.

    Returns:
        ``[n]`` and ``[n]``; see ``oriented_giou``.
    """
    iou, giou = oriented_giou(*box_parts(boxes_a, boxes_b))
    dtype = result_dtype(boxes_a, boxes_b)
    return iou.to(dtype), giou.to(dtype)


def oriented_giou(
    centre_a: Tensor, size_a: Tensor, rotation_a: Tensor, centre_b: Tensor, size_b: Tensor, rotation_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact oriented IoU and GIoU of n pairs of boxes from one intersection, computed in float64.

    A pair with a size that is not positive, or with any number that is not finite, has IoU 0, GIoU -1 and gradient 0.

    Args:
        centre_a, centre_b: ``[n, 3]`` metres.
        size_a, size_b: ``[n, 3]`` metres, along the columns of the rotations.
        rotation_a, rotation_b: ``[n, 3, 3]`` rotations, box axes to the common frame of reference.

    Returns:
        IoU ``[n]`` in [0, 1] and GIoU ``[n]`` in [-1, IoU]; float64 where all inputs are, else float32.
    """
    given = (centre_a, size_a, rotation_a, centre_b, size_b, rotation_b)
    pairs = unit_pairs(*given)
    common = common_volume(pairs)
    union = pairs.volumes - common
    iou = ratio(common, union, pairs.valid)
    # Rounding may leave the hull of identical boxes smaller than their union.
    filled = ratio(union, torch.maximum(_hull_volume(pairs), union), pairs.valid)
    giou = iou - (1 - filled)
    dtype = result_dtype(*given)
    return iou.to(dtype), giou.to(dtype)


def _hull_volume(pairs: Pairs) -> Tensor:
    """Volume ``[n]`` of the smallest box along the second box's axes around both."""
    to_b = pairs.rotation_b.transpose(1, 2)
    centre = -(to_b @ pairs.offset.clamp(-FARTHEST, FARTHEST)[..., None]).squeeze(-1)
    reach = ((to_b @ pairs.rotation_a).abs() @ pairs.size_a[..., None]).squeeze(-1) / 2
    low = torch.minimum(centre - reach, -pairs.size_b / 2)
    high = torch.maximum(centre + reach, pairs.size_b / 2)
    return product(high - low)
