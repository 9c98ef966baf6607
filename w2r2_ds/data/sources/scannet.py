"""Reader of ScanNet scenes: frames, camera poses, intrinsics, axis alignment and instance boxes.

Files below the data root, as ScanNet's and ScanRefer's preparation scripts write them::

    posed_images/SCENE/00000.jpg                colour image, RGB (other names: ``frame_files.py``)
                       00000.png                depth image, uint16, millimetres; 0 = no measurement
                       00000.txt                pose, 16 numbers [4, 4]: camera to raw world, metres
                       intrinsic.txt            16 numbers [4, 4], pinhole matrix of the colour images, pixels
                       depth_intrinsic.txt      the same of the depth images
    scans/SCENE/SCENE.txt                       a line "axisAlignment = 16 numbers": raw to axis-aligned world
    scannet_data/SCENE_aligned_bbox.npy         [N, 8]: cx cy cz dx dy dz label_id object_id, axis-aligned world, metres

Cameras follow OpenCV: x right, y down, z forward. The world has +z up. ScanNet's raw world has an arbitrary rotation
about z in every scan; ``axisAlignment`` makes the walls parallel to x and y.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from w2r2_ds.data.sources.cameras import check_principal_point, read_alignment, read_intrinsic
from w2r2_ds.data.sources.frame_files import DEPTH_INTRINSIC_FILES, INTRINSIC_FILES, intrinsic_file
from w2r2_ds.data.sources.frames import LOST_POSE, NOT_READ, Frame, SceneParts, read_frames
from w2r2_ds.utils.findings import Finding

_T = TypeVar("_T")
_SCENE_ID = re.compile(r"[A-Za-z0-9_]{1,100}")
ALL_PARTS = SceneParts.POSES | SceneParts.INTRINSICS | SceneParts.DEPTH | SceneParts.BOXES


@dataclass(frozen=True)
class Instance:
    """One annotated object of a scene.

    Attributes:
        object_id: ScanNet's ``objectId``, unique in the scene.
        label_id: NYU40 id of the object's category.
        box: ``[6]`` float64, centre and size in the axis-aligned world, metres.
    """

    object_id: int
    label_id: int
    box: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """One scan.

    A matrix of a part that was not read is NaN, and without ``BOXES`` there are no instances.

    Scenes are compared and hashed by identity, so that results per scene can be cached (``frames/coverage.py``).

    Attributes:
        scene_id: ScanNet scene name.
        frames: frames whose pose is not marked as lost, by ascending frame number.
        intrinsic: ``[4, 4]`` float64 pinhole matrix of the colour images, pixels.
        depth_intrinsic: ``[4, 4]`` float64 pinhole matrix of the depth images, pixels.
        axis_align: ``[4, 4]`` float64, raw world to axis-aligned world.
        instances: object id -> instance.
        broken_boxes: object id -> what is wrong with its box, for objects that are no instance for that reason.
        skipped_inputs: lost frames and broken boxes, which were skipped.
    """

    scene_id: str
    frames: tuple[Frame, ...]
    intrinsic: np.ndarray
    depth_intrinsic: np.ndarray
    axis_align: np.ndarray
    instances: dict[int, Instance]
    broken_boxes: dict[int, str] = field(default_factory=dict)
    skipped_inputs: tuple[Finding, ...] = ()

    @property
    def frames_without_pose(self) -> int:
        """Number of frames that were skipped because their pose is not finite."""
        return sum(finding.count for finding in self.skipped_inputs if finding.kind == LOST_POSE)


def is_scene_id(name: str) -> bool:
    """Whether `check_scene_id` accepts a name."""
    return _SCENE_ID.fullmatch(name) is not None


def check_scene_id(scene_id: str) -> str:
    """Return ``scene_id`` if it is safe in a path: 1 to 100 letters, digits and underscores; else raise ValueError."""
    if not is_scene_id(scene_id):
        raise ValueError(f"scene id {scene_id[:120]!r} is not made of letters, digits and underscores only, 1 to 100")
    return scene_id


def load_scene(root: Path | str, scene_id: str, parts: SceneParts = ALL_PARTS) -> Scene:
    """Read one scene.

    Lost frames are skipped and counted: those whose pose has nan or inf (ScanNet's mark of lost tracking), whose image
    cannot be read, or that lack a file. A lost pose counts without ``POSES`` too if there are pose files, so that all
    tasks choose from the same frames.

    Args:
        root: data root, see the module docstring for its files.
        scene_id: ScanNet scene name.
        parts: files to read besides the colour images; others may be missing.

    Raises:
        ValueError: a file is missing or malformed, or too many frames are lost; one line per problem, with the file.
    """
    root = Path(root)
    check_scene_id(scene_id)
    images = root / "posed_images" / scene_id
    problems: list[str] = []

    def collect(read: Callable[[], _T], default: _T) -> _T:
        """Call a reader, so that one error has the problems of all files of the scene."""
        try:
            return read()
        except ValueError as error:
            problems.append(str(error))
            return default

    axis_align = NOT_READ
    if SceneParts.POSES in parts:
        # Boxes are in the axis-aligned world; without them, the raw world of a scan without alignment will do.
        required = SceneParts.BOXES in parts
        axis_align = collect(lambda: read_alignment(alignment_file(root, scene_id), required), np.eye(4))
    frames = collect(lambda: read_frames(images, parts), None)
    has_files = frames is not None or _holds_files(images)  # else the error of `read_frames` is enough
    matrices = {SceneParts.INTRINSICS: NOT_READ, SceneParts.DEPTH: NOT_READ}
    for part, candidates, info_field in (
        (SceneParts.INTRINSICS, INTRINSIC_FILES, "m_calibrationColorIntrinsic"),
        (SceneParts.DEPTH, DEPTH_INTRINSIC_FILES, "m_calibrationDepthIntrinsic"),
    ):
        if part in parts and has_files:
            size = None if frames is None else frames.color_size if part is SceneParts.INTRINSICS else frames.depth_size
            file = intrinsic_file(images, candidates)
            matrices[part] = collect(partial(_checked_intrinsic, file, info_field, size), NOT_READ)
    boxes: dict[int, Instance] = {}
    broken: dict[int, str] = {}
    findings: tuple[Finding, ...] = ()
    if SceneParts.BOXES in parts:
        boxes, broken, findings = collect(lambda: read_instances(boxes_file(root, scene_id)), (boxes, broken, findings))
    if problems:
        raise ValueError("\n".join(problems))
    assert frames is not None
    return Scene(
        scene_id=scene_id,
        frames=tuple(replace(frame, cam_to_world=axis_align @ frame.cam_to_world) for frame in frames.frames),
        intrinsic=matrices[SceneParts.INTRINSICS],
        depth_intrinsic=matrices[SceneParts.DEPTH],
        axis_align=axis_align,
        instances=boxes,
        broken_boxes=broken,
        skipped_inputs=(*frames.lost, *findings),
    )


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds any file; False if it is missing or cannot be read."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _checked_intrinsic(file: Path, info_field: str, size: tuple[Path, tuple[int, int]] | None) -> np.ndarray:
    """The pinhole matrix of a file, compared with the size of an image: its path, and its width and height."""
    matrix = read_intrinsic(file, info_field)
    if size is not None:
        check_principal_point(file, matrix, *size)
    return matrix


def alignment_file(root: Path, scene_id: str) -> Path:
    """The scan's description, which has the line ``axisAlignment``."""
    return root / "scans" / scene_id / f"{scene_id}.txt"


def boxes_file(root: Path, scene_id: str) -> Path:
    """The boxes of a scene's objects."""
    return root / "scannet_data" / f"{scene_id}_aligned_bbox.npy"


def read_instances(path: Path) -> tuple[dict[int, Instance], dict[int, str], tuple[Finding, ...]]:
    """Read the boxes of a scene's objects; broken ones are skipped.

    All-zero rows, which ScanRefer's script writes for objects without points, are no objects.

    Returns:
        Object id -> instance; object id -> what is wrong with its box; and all broken rows.

    Raises:
        ValueError: the file is missing, is no array ``[N, 8]``, or every box is broken.
    """
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; make it with launchers/prepare.py boxes, from ScanNet's meshes"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable array of numbers; write it again ({error})") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 8 or rows.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers [N, 8]: cx cy cz dx dy dz label_id object_id; write it again")
    instances: dict[int, Instance] = {}
    broken: dict[int, str] = {}
    messages: list[str] = []
    for number, row in enumerate(rows.astype(np.float64)):
        if not row.any():
            continue
        problem = _box_problem(row)
        object_id = int(row[7]) if np.isfinite(row[7]) and row[7] == np.round(row[7]) else None
        if object_id in instances or object_id in broken:
            problem = f"repeats object id {object_id}"
            instances.pop(object_id, None)  # it is unknown which of the two is right
        if problem:
            messages.append(f"{path}: row {number} {problem}")
            if object_id is not None:
                broken.setdefault(object_id, messages[-1])
        elif object_id is not None:
            # columns: centre and size of the box, NYU40 id, object id
            instances[object_id] = Instance(object_id, int(row[6]), row[:6].copy())
    if messages and not instances:
        raise ValueError(f"{messages[0]}; every box of the file is broken, so write it again")
    findings = tuple(Finding("broken boxes in SCENE_aligned_bbox.npy", message) for message in messages)
    return instances, broken, findings


def _box_problem(row: np.ndarray) -> str:
    """What is wrong with a row of 8 numbers; empty for a valid box."""
    if not np.isfinite(row).all() or (row[6:] != np.round(row[6:])).any():
        return "has a non-finite value or an id that is no integer"
    if (row[3:6] <= 0).any():
        return f"(object {int(row[7])}) has the size {row[3:6].tolist()}, and a box has positive sides"
    return ""
