"""Reader of ScanNet scenes: frames, camera poses, intrinsics, axis alignment and instance boxes.

Files below the data root, as ScanNet's and ScanRefer's preparation scripts write them::

    posed_images/SCENE/00000.jpg                colour image, RGB
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
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path

import numpy as np

from w2r2_ds.utils.json_io import read_text

_SCENE_ID = re.compile(r"[A-Za-z0-9_]{1,100}")
_NOT_READ = np.full((4, 4), np.nan)
"""Matrix in place of a file that was not read."""


class SceneParts(Flag):
    """Files of a scene besides its colour images. A task declares those that it needs; no others are read."""

    NONE = 0
    POSES = auto()
    """The pose of every frame, and the scan's ``axisAlignment``."""
    INTRINSICS = auto()
    """``intrinsic.txt``."""
    DEPTH = auto()
    """The depth image of every frame, and ``depth_intrinsic.txt``."""
    BOXES = auto()
    """``SCENE_aligned_bbox.npy``."""


ALL_PARTS = SceneParts.POSES | SceneParts.INTRINSICS | SceneParts.DEPTH | SceneParts.BOXES


@dataclass(frozen=True)
class Frame:
    """One posed image.

    Attributes:
        index: frame number in the file names.
        color: RGB image file.
        depth: depth image file, uint16 PNG, millimetres along the camera's z axis; 0 means no measurement. It may be
            missing if the scene was read without ``DEPTH``.
        cam_to_world: ``[4, 4]`` float64, OpenCV camera to *axis-aligned* world (``axis_align @ pose``), metres; NaN if
            the scene was read without ``POSES``.
    """

    index: int
    color: Path
    depth: Path
    cam_to_world: np.ndarray


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
        frames_without_pose: number of frames that were skipped because their pose is not finite.
    """

    scene_id: str
    frames: tuple[Frame, ...]
    intrinsic: np.ndarray
    depth_intrinsic: np.ndarray
    axis_align: np.ndarray
    instances: dict[int, Instance]
    frames_without_pose: int


def check_scene_id(scene_id: str) -> str:
    """Return ``scene_id`` if it is safe in a path: 1 to 100 letters, digits and underscores; else raise ValueError."""
    if not _SCENE_ID.fullmatch(scene_id):
        raise ValueError(f"scene id {scene_id[:120]!r} is not made of letters, digits and underscores only, 1 to 100")
    return scene_id


def load_scene(root: Path | str, scene_id: str, parts: SceneParts = ALL_PARTS) -> Scene:
    """Read one scene.

    Frames whose pose contains nan or inf, ScanNet's mark of lost tracking, are skipped and counted. This holds without
    ``POSES`` too if there are pose files, so that all tasks choose from the same frames.

    Args:
        root: data root, see the module docstring for its files.
        scene_id: ScanNet scene name.
        parts: files to read besides the colour images; others may be missing.

    Raises:
        ValueError: a file is missing or malformed (the message names it), or no frame has a valid pose.
    """
    root = Path(root)
    check_scene_id(scene_id)
    images = root / "posed_images" / scene_id
    axis_align = _NOT_READ
    if SceneParts.POSES in parts:
        # Boxes are in the axis-aligned world; without them, the raw world of a scan without alignment will do.
        axis_align = read_alignment(alignment_file(root, scene_id), required=SceneParts.BOXES in parts)
    frames, without_pose = _read_frames(images, axis_align, parts)
    return Scene(
        scene_id=scene_id,
        frames=frames,
        intrinsic=_read_intrinsic(images / "intrinsic.txt") if SceneParts.INTRINSICS in parts else _NOT_READ,
        depth_intrinsic=_read_intrinsic(images / "depth_intrinsic.txt") if SceneParts.DEPTH in parts else _NOT_READ,
        axis_align=axis_align,
        instances=_read_instances(boxes_file(root, scene_id)) if SceneParts.BOXES in parts else {},
        frames_without_pose=without_pose,
    )


def alignment_file(root: Path, scene_id: str) -> Path:
    """The scan's description, which has the line ``axisAlignment``."""
    return root / "scans" / scene_id / f"{scene_id}.txt"


def boxes_file(root: Path, scene_id: str) -> Path:
    """The boxes of a scene's objects."""
    return root / "scannet_data" / f"{scene_id}_aligned_bbox.npy"


def _read_text(path: Path, content: str) -> str:
    """Text of a file; `content` describes it in messages."""
    return read_text(path, f"{content}; prepare the scene, or correct data.root (or --root)")


def _matrix(text: str, path: Path, field: str) -> np.ndarray:
    """``[4, 4]`` float64 matrix of 16 numbers in a text, of which some may be nan or inf."""
    words = text.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{path}: {field} holds something that is not a number; extract it again") from None
    if len(values) != 16:
        raise ValueError(f"{path}: {field} has {len(values)} numbers instead of 16; the file may be truncated")
    return np.array(values, dtype=np.float64).reshape(4, 4)


def read_alignment(path: Path, required: bool = True) -> np.ndarray:
    """Matrix ``axisAlignment`` of a file ``scans/SCENE/SCENE.txt``: ``[4, 4]`` float64, raw to axis-aligned world.

    Args:
        path: the scan's description.
        required: whether a file without the line is an error. If not, the result is the identity; ScanNet's hidden test
            scans have no alignment.

    Raises:
        ValueError: the file is missing, the matrix is not a rotation and a translation, or the line is missing although
            it is required.
    """
    for line in _read_text(path, "the scan's description").splitlines():
        name, equals, value = line.partition("=")
        if equals and name.strip() == "axisAlignment":
            matrix = _matrix(value, path, "axisAlignment")
            rotation = matrix[:3, :3]
            if not np.isfinite(matrix).all() or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
                raise ValueError(f"{path}: axisAlignment is not a rotation and a translation; copy the file again")
            return matrix
    if not required:
        return np.eye(4)
    raise ValueError(f"{path}: there is no line 'axisAlignment = 16 numbers'; ScanNet's hidden test scans have none")


def _read_intrinsic(path: Path) -> np.ndarray:
    """``[4, 4]`` float64 pinhole matrix of an intrinsics file, pixels."""
    matrix = _matrix(_read_text(path, "the camera's intrinsics"), path, "the intrinsic matrix")
    if not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise ValueError(f"{path}: the focal lengths must be positive and every entry finite; write the file again")
    return matrix


def _read_frames(folder: Path, axis_align: np.ndarray, parts: SceneParts) -> tuple[tuple[Frame, ...], int]:
    """Frames of a folder whose pose is not lost, by ascending frame number, and the number of the other frames."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist; extract the scene's images and poses, or correct data.root (or --root)"
        )
    contents = frame_files(parts)
    # A frame exists if any of its files does; a missing one is an error. intrinsic.txt is no frame number.
    stems = sorted({p.stem for p in folder.iterdir() if p.suffix in contents and p.stem.isdecimal()}, key=int)
    frames, without_pose = [], 0
    for stem in stems:
        for suffix, content in contents.items():
            path = folder / f"{stem}{suffix}"
            if not path.is_file():
                raise ValueError(f"{path} is missing: frame {stem} has no {content}; extract the scene's frames again")
        color, depth, pose_file = (folder / f"{stem}{suffix}" for suffix in (".jpg", ".png", ".txt"))
        if SceneParts.POSES in parts:
            pose = _matrix(_read_text(pose_file, "a camera pose"), pose_file, "the pose")
            is_lost = not np.isfinite(pose).all()
        else:
            pose = _NOT_READ
            is_lost = pose_file.is_file() and _is_marked_lost(_read_text(pose_file, "a camera pose"))
        if is_lost:
            without_pose += 1
        else:
            # camera -> raw world -> axis-aligned world
            frames.append(Frame(int(stem), color, depth, axis_align @ pose))
    if not frames and (without_pose or SceneParts.POSES in parts):
        raise ValueError(f"{folder} has no frame with a valid pose ({without_pose} not finite); extract it again")
    if not frames:
        raise ValueError(f"{folder} has no frames named like 00000.jpg; extract the scene's frames")
    return tuple(frames), without_pose


def frame_files(parts: SceneParts) -> dict[str, str]:
    """Suffix -> content of the files of a frame that are read."""
    files = {".jpg": "colour image"}
    if SceneParts.POSES in parts:
        files[".txt"] = "pose"
    if SceneParts.DEPTH in parts:
        files[".png"] = "depth image"
    return files


def _is_marked_lost(pose: str) -> bool:
    """Whether the text of a pose has nan or inf."""
    return any(word.lower().lstrip("+-").startswith(("nan", "inf")) for word in pose.split())


def _read_instances(path: Path) -> dict[int, Instance]:
    """Object id -> instance. All-zero rows, which ScanRefer's script writes for objects without points, are skipped."""
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
    for number, row in enumerate(rows.astype(np.float64)):
        if not row.any():
            continue
        # columns: centre and size of the box, NYU40 id, object id
        if not np.isfinite(row).all() or (row[6:] != np.round(row[6:])).any():
            raise ValueError(
                f"{path}: row {number} has a non-finite value or an id that is no integer; write the file again"
            )
        if (row[3:6] <= 0).any():
            raise ValueError(
                f"{path}: row {number} (object {int(row[7])}) has the size {row[3:6].tolist()}, and a box has positive "
                "sides; write the file again, or fill the row with zeros to skip the object"
            )
        object_id = int(row[7])
        if object_id in instances:
            raise ValueError(f"{path}: row {number} repeats object id {object_id}; write the file again")
        instances[object_id] = Instance(object_id, int(row[6]), row[:6].copy())
    return instances
