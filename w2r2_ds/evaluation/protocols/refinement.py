"""Proposal refinement: a predicted box gives way to the detected box that overlaps it most.

The numbers in parentheses in VG-LLM's and SPAR's tables are refined so (LaVi-Lab/VG-LLM, with Mask3D's proposals):
another protocol than direct prediction, since it measures which object was meant rather than where its faces are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou


def refine(box: Sequence[float], proposals: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The proposal of the highest exact IoU with a box, the first of equals; the box itself where none overlaps it.

    Args:
        box: six numbers (centre, size) or nine (and ZXY angles), in the world; metres, radians.
        proposals: boxes of its scene, in the same convention.

    Returns:
        one of them, as given.

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


def nine_numbers(box: Sequence[float]) -> list[float]:
    """A box as ``boxes3d/transforms.py`` has it; without angles it is axis-aligned.

    Raises:
        ValueError: neither six nor nine numbers.
    """
    if len(box) not in (6, 9):
        raise ValueError(f"A box must have six numbers (centre, size) or nine (and angles), not {len(box)}.")
    return [*map(float, box), 0.0, 0.0, 0.0][:9]
