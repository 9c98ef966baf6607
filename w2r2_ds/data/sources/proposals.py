"""Reader of detector proposals: ``scannet_{train,val}_pred_box.json``.

::

    {"scannet/scene0011_00": [[cx, cy, cz, dx, dy, dz], ...], ...}

Boxes are centre and size in the axis-aligned world, metres. Scene names may lack the prefix ``scannet/``. The public
files have the bounding boxes of Mask3D's masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.data.sources.validation import error_lines, raise_problems, validate
from w2r2_ds.utils.files.json_io import read_json
from w2r2_ds.utils.sanitize import one_line

SOURCE = "a JSON object that maps a scene to its proposed boxes, such as Mask3D's from VG-LLM's public data"
SCAN_PREFIX = "scannet/"


def _positive_sizes(box: list[float]) -> list[float]:
    if min(box[3:]) <= 0:
        raise ValueError("a box has positive sizes")
    return box


_Coordinate = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Box = Annotated[list[_Coordinate], Field(min_length=6, max_length=6), AfterValidator(_positive_sizes)]
_BOX = TypeAdapter(_Box)
_CONTENT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class BoxProposals(dict[str, np.ndarray]):
    """Scene id -> ``[N, 6]`` float64 centre and size, in the file's order; N may be 0.

    Attributes:
        indices: scene id -> index in the file's list of each box that was kept.
        broken_boxes: scene id -> one message for each box that was skipped in the scene.
        broken: scene id -> message, for scenes that were skipped: none of their boxes is valid, or they occur twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, tuple[int, ...]] = {}
        self.broken_boxes: dict[str, tuple[str, ...]] = {}
        self.broken: dict[str, str] = {}


def read_proposals(path: Path | str) -> BoxProposals:
    """Read the proposed boxes of all scenes; broken boxes are skipped and recorded.

    Raises:
        ValueError: the file is not readable, a scene has an unsafe name, or no scene is valid. The message has scene
            and box of the first ten errors.
    """
    proposals = BoxProposals()
    problems = []
    for name, boxes in validate(_CONTENT, read_json(path, SOURCE), path).items():
        scene_id = name.removeprefix(SCAN_PREFIX)
        try:
            check_scene_id(scene_id)
        except ValueError as error:
            problems.append(f"{path}: {error}; correct the name")
            continue
        if scene_id in proposals or scene_id in proposals.broken:
            proposals.pop(scene_id, None)  # it is unknown which of the two is right
            proposals.broken_boxes.pop(scene_id, None)
            proposals.broken[scene_id] = f"{path}: scene {one_line(scene_id)} occurs twice; remove one of the two"
        elif not isinstance(boxes, list):
            proposals.broken[scene_id] = f"{path}: field {one_line(name)!r}: must be a list of boxes"
        else:
            valid, messages = _valid_boxes(path, name, boxes)
            if messages and not valid:
                proposals.broken[scene_id] = "\n".join(messages)
                continue
            proposals[scene_id] = np.array(list(valid.values()), dtype=np.float64).reshape(-1, 6)
            proposals.indices[scene_id] = tuple(valid)
            if messages:
                proposals.broken_boxes[scene_id] = tuple(messages)
    if not proposals:
        problems = [*(line for message in proposals.broken.values() for line in message.splitlines()), *problems]
    raise_problems(path, problems)
    if not proposals:
        raise ValueError(f"{path} has no scene; it must be {SOURCE}")
    return proposals


def _valid_boxes(path: Path | str, name: str, boxes: list[Any]) -> tuple[dict[int, list[float]], list[str]]:
    """Index -> box for the valid boxes of a scene, and one message per error of the others."""
    valid: dict[int, list[float]] = {}
    messages: list[str] = []
    for index, box in enumerate(boxes):
        try:
            valid[index] = _BOX.validate_python(box)
        except ValidationError as error:
            messages += error_lines(error, path, prefix=(name, index))
    return valid, messages
