"""The plain records that tasks make and everything after them reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["grounding", "caption", "answer"]
"""What an answer is: numbers of a box, a sentence, or a short answer. Slots and similarity follow from it."""


@dataclass(frozen=True)
class Target:
    """What an answer is scored against.

    Attributes:
        box: ``[9]`` float64 world box (centre, size, ZXY angles; metres, radians).
        object_id: instance id in the scene.
        object_name: annotated name, with spaces.
        group: ``"unique"`` or ``"multiple"`` (ScanRefer's rule, see ``data/tasks/scanrefer.py``).
    """

    box: np.ndarray
    object_id: int
    object_name: str
    group: str


@dataclass(frozen=True)
class Sample:
    """One question about one ordered set of frames.

    Attributes:
        id: unique within a data set, e.g. ``"scene0000_00|5|chair|0"``.
        task: name of the task that made it, e.g. ``"scanrefer"``.
        scene_id: ScanNet scene name.
        frames: colour image files, in the order in which the model sees them; none for a question about no scene.
        cam_to_world: ``[frames, 4, 4]`` float64, camera to axis-aligned world; ``[0, 4, 4]`` without frames.
        question: text after the frames.
        answer: the text to be learned; empty where the object is in no frame (validation only).
        target: what the answer is scored against; None for answers without a box.
        kind: what the answer is.
        what: characters ``[begin, end)`` of `question` that say what is meant; empty where nothing does.
    """

    id: str
    task: str
    scene_id: str
    frames: tuple[Path, ...]
    cam_to_world: np.ndarray
    question: str
    answer: str
    target: Target | None = None
    kind: Kind = "grounding"
    what: tuple[int, int] = (0, 0)
