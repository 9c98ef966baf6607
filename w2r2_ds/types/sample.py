"""`Sample`: one question about an ordered set of frames, with its answer and annotations; a row of a prepared set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["grounding", "caption", "answer"]
"""Kind of an answer: the numbers of a box, a sentence, or a short answer. It determines the *where* tokens, and how the
similarity of a predicted answer to its label is measured."""

BoxFormat = Literal["camera", "world"]
"""Numbers of a grounding answer, in the order of its text.

``camera``: frame index, then centre, size and ZXY angles of the box in that frame's camera (ten numbers).
``world``: lowest and highest corner of the axis-aligned box in the world, x_min, y_min, z_min, x_max, y_max, z_max.
"""

_SCAN = re.compile(r"(scene\d{4})_\d{2}")
"""A scan's name in ScanNet: room and number of the scan."""


def room_of(scene_id: str) -> str:
    """Room of a scene: ``scene0011`` for ``scene0011_00`` and ``scene0011_01``, ScanNet's two scans of one room.

    A name of another form is its own room.
    """
    scan = _SCAN.fullmatch(scene_id)
    return scan[1] if scan else scene_id


@dataclass(frozen=True)
class Target:
    """The object that a question refers to, or that a caption describes.

    Attributes:
        box: ``[9]`` float64 world box (centre, size, ZXY angles; metres, radians).
        object_id: instance id in the scene.
        object_name: annotated name, with spaces.
        group: ``"unique"`` if no other object of the scene has its class, else ``"multiple"``; by ScanNet's 18 classes
            (``data/sources/labels.py``).
        group_nyu40: the same by NYU40 class ids.
        scannet_class: 0 to 16 for ScanNet's named classes, 17 for others.
        ann_id: number of the description of this object, as in ScanRefer's file; empty if the file has none, and in
            Scan2Cap's validation set, which has one sample per object.
        described: ``[6]`` float64 centre and size of the box in a caption's prompt (annotated or proposed); None for
            other tasks.
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
    """A reference text for scoring; `words` is its tokenization in the annotation file, empty if that has none."""

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
        task: name of its registered task.
        scene_id: name of the scene.
        frames: colour image files, in the order of the model's input; empty for a question without frames.
        cam_to_world: ``[frames, 4, 4]`` float64, camera to axis-aligned world; NaN if the task needs no poses,
            ``[0, 4, 4]`` without frames.
        question: text of the prompt after the frames.
        answer: text of the label; empty if the target is in no frame (validation only).
        target: the object that the question refers to, or that a caption describes; None if there is none.
        kind: kind of the answer.
        box_format: numbers of the answer, if `kind` is ``grounding``; not used for other kinds.
        decimals: digits after the decimal point of world coordinates in `question` and `answer`; not used for others.
        what: span ``[begin, end)``, in characters of `question`, of the *what* tokens: the description of the target.
            Empty (``begin == end``) if there is none.
        references: texts that a generated caption or short answer is scored against.
        objects: objects that a detection is scored against.
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
    box_format: BoxFormat = "camera"
    decimals: int = 2
    what: tuple[int, int] = (0, 0)
    references: tuple[Reference, ...] = ()
    objects: tuple[LabeledBox, ...] = ()

    @property
    def is_annotated(self) -> bool:
        """Whether there is anything to compare an answer with; False in test splits, whose answers are hidden."""
        return bool(self.answer or self.target or self.references or self.objects)
