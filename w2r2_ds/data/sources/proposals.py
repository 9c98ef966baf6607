"""Boxes that a detector proposes: ``scannet_{train,val}_pred_box.json``.

::

    {"scannet/scene0011_00": [[cx, cy, cz, dx, dy, dz], ...], ...}

Axis-aligned world, metres; keys with or without ``scannet/``. The public ones are Mask3D's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.sources.entries import Problems, too_long
from w2r2_ds.data.sources.json_reader import LONGEST_MEMBER, members
from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.utils.sanitize import one_line

SOURCE = "a JSON object that maps a scene to its proposed boxes, such as Mask3D's from VG-LLM's public data"
PREFIX = "scannet/"


def read_proposals(path: Path | str) -> dict[str, np.ndarray]:
    """Scene id -> ``[N, 6]`` float64 centre and size, in the file's order; N may be 0.

    Raises:
        ValueError: the file is not readable, a scene is there twice, or a box is not six finite numbers with positive
            sizes; all such are named by line, scene and box (the first ten, and how many there are).
    """
    problems = Problems(path)
    proposals: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    for member in members(Path(path), SOURCE, "{"):
        scene_id, before = member.name.removeprefix(PREFIX), problems.count
        problems.read(_check_name, scene_id, member.where)
        if scene_id in seen:
            problems.add(f"{member.where}: scene {one_line(scene_id)} is there twice; remove one of the two")
        if member.length > LONGEST_MEMBER:
            problems.add(too_long(member.where, member.length))
        seen.add(scene_id)
        boxes = _boxes(member.value, member.where, problems)
        if problems.count == before:
            proposals[scene_id] = np.array(boxes, dtype=np.float64).reshape(-1, 6)
    problems.raise_any()
    if not proposals:
        raise ValueError(f"{path} has no scene; it must be {SOURCE}")
    return proposals


def _check_name(scene_id: str, where: str) -> None:
    try:
        check_scene_id(scene_id)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; correct the name") from None


def _boxes(value: Any, where: str, problems: Problems) -> list[list[float]]:
    """The boxes that are sound; a problem for each of the others."""
    if not isinstance(value, list):
        problems.add(f"{where}: is no list of boxes; write the file again")
        return []
    sound = []
    for number, box in enumerate(value):
        place = f"{where}: box {number} (from 0)"
        if not isinstance(box, list) or len(box) != 6 or not all(_finite(each) for each in box):
            problems.add(f"{place} is not six finite numbers: centre and size; write the file again")
        elif min(box[3:]) <= 0:
            problems.add(f"{place} has the size {box[3:]}, and a box has positive sides; write the file again")
        else:
            sound.append(box)
    return sound


def _finite(value: Any) -> bool:
    # Whole numbers of hundreds of digits are JSON, too, and no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
