"""Samples whose answer is a world box: six numbers, lowest and highest corner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from w2r2_ds.data.tasks.scanrefer import WORLD_QUESTION, description_span, question_text, world_answer_text

BOXES = np.array(
    [
        [-1.2, 0.55, 0.4, 1.1, 0.8, 0.75, 0, 0, 0],  # the first number is negative
        [2.5, -3.1, 0.9, 0.62, 2.3, 1.8, 0, 0, 0],
        [11.3, 4.75, -0.2, 1.4, 1.9, 0.6, 0, 0, 0],  # numbers with two digits before the decimal point
    ]
)

POSITIVE = np.array([3.1, 4.2, 1.9, 1.6, 2.2, 1.4, 0, 0, 0])
"""A box without negative numbers: its expected size is positive even if no token is likely."""


def in_world(
    sample: Any, box: np.ndarray, description: str = "the red chair.", decimals: int = 2, **changes: Any
) -> Any:
    """The sample with Video-3D-LLM's question and answer for a ``[9]`` axis-aligned world box, and without poses."""
    return replace(
        sample,
        id=f"{sample.id} in world",
        cam_to_world=np.full_like(sample.cam_to_world, np.nan),
        question=question_text(description, WORLD_QUESTION),
        answer=world_answer_text(box, decimals),
        decimals=decimals,
        target=replace(sample.target, box=box),
        what=description_span(description, WORLD_QUESTION),
        box_format="world",
        **changes,
    )
