"""Proposal refinement: replaces a predicted box by the detected box that overlaps it most.

The numbers in parentheses in VG-LLM's and SPAR's tables are refined in this way, with Mask3D's proposals
(LaVi-Lab/VG-LLM). They are not comparable with direct prediction: refinement measures whether the right object was
found, not where its faces are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.evaluation.protocols.records import nine_numbers


def refine(box: Sequence[float], proposals: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The proposal of the highest exact IoU with a box, the first of equals; the box itself if none overlaps it.

    Args:
        box: six numbers (centre, size) or nine (and ZXY angles), in the world; metres, radians.
        proposals: boxes of its scene, in the same convention.

    Raises:
        ValueError: a box of another length.
    """
    if not proposals:
        return tuple(box)
    others = torch.tensor([nine_numbers(proposal) for proposal in proposals], dtype=torch.float64)
    own = torch.tensor([nine_numbers(box)], dtype=torch.float64).expand_as(others)
    ious = box_iou(own, others).numpy()
    best = int(np.argmax(ious))
    return tuple(proposals[best]) if ious[best] > 0 else tuple(box)
