"""Cues of a shifted validation split: the boxes that a model would answer which uses 2D appearance alone.

``shortcut_cues/scanrefer_val_NAME.jsonl`` has one JSON object per description of
``ScanRefer/ScanRefer_filtered_val_NAME.json``, in its order, with the fields of `ShortcutCue`. The boxes are ``[9]``
(``boxes3d/transforms.py``), in the world of the shifted scene. ``launchers/prepare.py synthetic --shift`` writes the
files; docs/research/shortcut-benchmark.md explains the cues.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter

from w2r2_ds.data.sources.validation import FrozenModel, Integer, Name, SceneId, validate
from w2r2_ds.utils.files.json_io import read_jsonl


def _finite(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if not np.isfinite(numbers).all():
        raise ValueError("must be finite")
    return numbers


Box9 = Annotated[tuple[float, ...], Field(min_length=9, max_length=9), AfterValidator(_finite)]
"""Box in the axis-aligned world: centre, size (metres) and ZXY angles (radians)."""


class FrameCue(FrozenModel):
    """The cue in one frame that shows the object.

    Attributes:
        frame: number of the frame, as in its file name.
        area: area of the box's projection in square pixels; 0 if it leaves the image on opposite sides (`clear_area`).
        camera: cue for an answer in the coordinates of this frame's camera, moved to the world by the frame's pose.
        world: cue for an answer in world coordinates, from this frame. It differs from `camera` if the shift changes
            the pose of the camera: a model without geometry then assumes the pose that it is used to.
    """

    frame: Integer
    area: float
    camera: Box9
    world: Box9


class ShortcutCue(FrozenModel):
    """The cues of one description.

    Attributes:
        id: id of the sample in the prepared set of the shifted split.
        paired_id: id of the sample with the same sentence about the same object in the set of ``val``.
        shift: name of the shift.
        scene_id: shifted scene.
        object_id: id of the object, in both scenes.
        parameters: parameters of the shift; ``furniture_scale`` has the object's own ``factor``.
        truth: annotated box in the shifted scene.
        paired_truth: annotated box in the scene of ``val``.
        frames: one cue per frame that shows the object; empty if the shift has no cue for this object.
    """

    id: Name
    paired_id: Name
    shift: Name
    scene_id: SceneId
    object_id: Integer
    parameters: dict[str, float | str]
    truth: Box9
    paired_truth: Box9
    frames: tuple[FrameCue, ...]

    def camera_box(self, frame: int) -> np.ndarray | None:
        """World box ``[9]`` of the cue for an answer in the camera of a frame; None if that frame has no cue."""
        found = [cue.camera for cue in self.frames if cue.frame == frame]
        return np.array(found[0]) if found else None

    def world_box(self, frames: Collection[int] | None = None) -> np.ndarray | None:
        """World box ``[9]`` of the cue for an answer in world coordinates; None if no frame has a cue.

        Args:
            frames: numbers of the frames of the model's input; the one that shows the object largest gives the cue.
                None for all frames of the scene.
        """
        usable = [cue for cue in self.frames if frames is None or cue.frame in frames]
        return np.array(max(usable, key=lambda cue: cue.area).world) if usable else None


_CUE = TypeAdapter(ShortcutCue)


def cues_file(root: Path, split: str) -> Path:
    """File of the cues of a shifted split, e.g. ``val_camera``."""
    return root / "shortcut_cues" / f"scanrefer_{split}.jsonl"


def write_cues(path: Path, cues: Iterable[dict[str, Any]]) -> None:
    """Write cues; the values of the dictionaries are those of `ShortcutCue`, as JSON values."""
    path.write_text("".join(json.dumps(cue) + "\n" for cue in cues), encoding="utf-8")


def read_cues(path: Path) -> dict[str, ShortcutCue]:
    """Sample id -> cue, in the order of the file.

    Raises:
        ValueError: the file is missing or invalid (the message has line and field), or an id is repeated.
    """
    cues: dict[str, ShortcutCue] = {}
    for number, entry in read_jsonl(path, "the cues of a shifted split, from launchers/prepare.py synthetic --shift"):
        cue = validate(_CUE, entry, f"{path}: line {number}")
        if cue.id in cues:
            raise ValueError(f"{path}: line {number}: id {cue.id!r} is repeated.")
        cues[cue.id] = cue
    return cues
