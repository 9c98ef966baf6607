"""Reader of detector proposals: ``scannet_{train,val}_pred_box.json``.

::

    {"scannet/scene0011_00": [[cx, cy, cz, dx, dy, dz], ...], ...}

Boxes are centre and size in the axis-aligned world, metres. Scene names may lack the prefix ``scannet/``. The public
files have the bounding boxes of Mask3D's masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter

from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.data.sources.validation import raise_problems, validate
from w2r2_ds.utils.json_io import read_json
from w2r2_ds.utils.sanitize import one_line

SOURCE = "a JSON object that maps a scene to its proposed boxes, such as Mask3D's from VG-LLM's public data"
SCAN_PREFIX = "scannet/"


def _positive_sizes(box: list[float]) -> list[float]:
    if min(box[3:]) <= 0:
        raise ValueError("a box has positive sizes")
    return box


_Coordinate = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Box = Annotated[list[_Coordinate], Field(min_length=6, max_length=6), AfterValidator(_positive_sizes)]
_PROPOSALS = TypeAdapter(dict[str, list[_Box]])


def read_proposals(path: Path | str) -> dict[str, np.ndarray]:
    """Read the proposed boxes of all scenes.

    Returns:
        Scene id -> ``[N, 6]`` float64 centre and size, in the file's order; N may be 0.

    Raises:
        ValueError: the file is not readable, a scene occurs twice, or a box is not six finite numbers with positive
            sizes. The message has scene and box of the first ten errors.
    """
    proposals: dict[str, np.ndarray] = {}
    problems = []
    for name, boxes in validate(_PROPOSALS, read_json(path, SOURCE), path).items():
        scene_id = name.removeprefix(SCAN_PREFIX)
        try:
            check_scene_id(scene_id)
        except ValueError as error:
            problems.append(f"{path}: {error}; correct the name")
        if scene_id in proposals:
            problems.append(f"{path}: scene {one_line(scene_id)} occurs twice; remove one of the two")
        proposals[scene_id] = np.array(boxes, dtype=np.float64).reshape(-1, 6)
    raise_problems(path, problems)
    if not proposals:
        raise ValueError(f"{path} has no scene; it must be {SOURCE}")
    return proposals
