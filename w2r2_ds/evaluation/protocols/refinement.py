"""Proposal refinement: replace a predicted box by the detected box (proposal) of highest IoU.

The numbers in parentheses in VG-LLM's and SPAR's tables are refined in this way, with Mask3D's proposals
(LaVi-Lab/VG-LLM). They are not comparable with direct prediction: refined scores measure whether the right object was
found, not how accurate its predicted box is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.evaluation.protocols.records import nine_numbers


def refine(box: Sequence[float], proposals: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The proposal with the highest exact IoU, the first of equal ones; the box itself if no proposal overlaps it.

    Args:
        box: world box of six numbers (centre, size) or nine (and ZXY angles); metres, radians.
        proposals: detected boxes of its scene, in the same convention.

    Raises:
        ValueError: a box of another length.
    """
    if not proposals:
        return tuple(box)
    others = torch.tensor([nine_numbers(proposal) for proposal in proposals], dtype=torch.float64)  # [proposals, 9]
    predicted = torch.tensor([nine_numbers(box)], dtype=torch.float64).expand_as(others)
    ious = box_iou(predicted, others).numpy()
    best = int(np.argmax(ious))  # the first of equal IoUs
    return tuple(proposals[best]) if ious[best] > 0 else tuple(box)
