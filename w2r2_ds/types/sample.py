"""The plain records that tasks make and everything after them reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["grounding", "caption", "answer"]
"""Kind of an answer: numbers of a box, a sentence, or a short answer. Digit tokens and similarity follow from it."""


@dataclass(frozen=True)
class Target:
    """The object that a question means, or that a caption is about.

    Attributes:
        box: ``[9]`` float64 world box (centre, size, ZXY angles; metres, radians).
        object_id: instance id in the scene.
        object_name: annotated name, with spaces.
        group: ``"unique"`` or ``"multiple"`` by ScanNet's 18 classes (``data/sources/labels.py``).
        group_nyu40: the same by NYU40 ids.
        scannet_class: 0 to 16 for ScanNet's named classes, 17 for others.
        ann_id: number of the description of this object, as in ScanRefer's file; empty for a caption's object.
        described: ``[6]`` float64, the box that a caption's prompt was made from (annotated or proposed); None if none.
    """

    box: np.ndarray
    object_id: int
    object_name: str
    group: str
    group_nyu40: str = "unique"
    scannet_class: int = 17
    ann_id: str = ""
    described: np.ndarray | None = None


@dataclass(frozen=True)
class Reference:
    """A text that a generated one is scored against; ``words`` as the annotation file splits it, where it does."""

    text: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabeledBox:
    """One object of a detection: its category and its ``[9]`` float64 box in the reference frame's camera."""

    label: str
    box: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One question about one ordered set of frames.

    Attributes:
        id: unique within a data set, e.g. ``"scene0000_00|5|chair|0"``.
        task: name of the task that made it: scanrefer, scan2cap, scanqa or detection.
        scene_id: ScanNet scene name.
        frames: colour image files, in the order of the model's input; none for a question about no scene.
        cam_to_world: ``[frames, 4, 4]`` float64, camera to axis-aligned world; ``[0, 4, 4]`` without frames.
        question: text after the frames.
        answer: the text to be learned; empty where the object is in no frame (validation only).
        target: the object that is meant; None where there is none.
        kind: what the answer is.
        what: characters ``[begin, end)`` of `question` that say what is meant; empty where nothing does.
        references: all texts that a caption or a short answer is scored against.
        objects: what a detection is scored against.
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
    references: tuple[Reference, ...] = ()
    objects: tuple[LabeledBox, ...] = ()
