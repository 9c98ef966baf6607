"""EmbodiedScan's annotations of ScanNet: which objects a frame shows, and boxes that are turned.

``embodiedscan_infos_{train,val}.pkl``::

    {"metainfo": {"categories": {"chair": 4, ...}},
     "data_list": [{"sample_idx": "scannet/scene0415_00", "axis_align_matrix": [4, 4],
                    "images": [{"img_path": "scannet/posed_images/scene0415_00/00010.jpg", "cam2global": [4, 4],
                                "visible_instance_ids": [0, 3]}, ...],
                    "instances": [{"bbox_3d": [9], "bbox_label_3d": 4, "bbox_id": 7}, ...]}, ...]}

``visible_instance_ids`` are *places in the list* ``instances``, not values of ``bbox_id``: EmbodiedScan's own data set
sets ``mask[ids]`` of a mask as long as that list (``embodiedscan_dataset.py``: ``_ids2masks``), and VG-LLM takes
``sample["instances"][id]`` (``process_threedod.py``). A place that the list does not have is refused here.

Boxes: centre, size, ZXY angles (``boxes3d/transforms.py``), in the axis-aligned world; metres, radians.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.sources.entries import Problems
from w2r2_ds.data.sources.numpy_unpickler import load_plain
from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.utils.sanitize import one_line

SOURCE = "EmbodiedScan's infos, which its authors send on request"
SCANNET = "scannet"


@dataclass(frozen=True)
class InfoInstance:
    """One object.

    Attributes:
        index: its place in the scene's list, which ``ScanInfo.visible`` names.
        bbox_id: EmbodiedScan's number of the box.
        label: its category.
        box: ``[9]`` float64, axis-aligned world.
    """

    index: int
    bbox_id: int
    label: str
    box: np.ndarray


@dataclass(frozen=True)
class ScanInfo:
    """One scene.

    Attributes:
        scene_id: ScanNet scene name.
        axis_align: ``[4, 4]`` float64, raw world to axis-aligned world.
        visible: frame number (that of the image's name) -> ``InfoInstance.index`` of the objects it shows.
        poses: frame number -> ``[4, 4]`` float64, OpenCV camera to *raw* world.
        instances: in the file's order.
        dropped_frames: how many frames are left out because their pose is not finite.
    """

    scene_id: str
    axis_align: np.ndarray
    visible: dict[int, frozenset[int]]
    poses: dict[int, np.ndarray]
    instances: tuple[InfoInstance, ...]
    dropped_frames: int = 0


class Infos(dict[str, ScanInfo]):
    """Scene id -> info.

    Attributes:
        skipped: data set -> how many of its scenes the file holds besides ScanNet's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, int] = {}


def read_infos(path: Path | str) -> Infos:
    """The ScanNet scenes of an infos file; 3RScan's, Matterport3D's and others are skipped and counted.

    Raises:
        ValueError: the file is no such pickle, or scenes are malformed: a field is missing or has another shape, a size
            is not positive, a category, frame or visible object does not exist or exists twice. All of it is named by
            file, scene and field (the first ten, and how many there are).
    """
    path = Path(path)
    content = load_plain(path, SOURCE)
    metainfo, scenes = (content.get(name) if isinstance(content, dict) else None for name in ("metainfo", "data_list"))
    if not isinstance(metainfo, dict) or not isinstance(scenes, list):
        raise ValueError(f"{path} must hold a dictionary with 'metainfo' and 'data_list'; it must be {SOURCE}")
    labels = _labels(metainfo.get("categories"), path)
    infos, problems = Infos(), Problems(path)
    for number, entry in enumerate(scenes, start=1):
        name = entry.get("sample_idx") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            problems.add(f"{path}: scene {number} of data_list: field 'sample_idx' is missing; copy the file again")
            continue
        source, _, scene_id = name.partition("/")
        if source != SCANNET:
            infos.skipped[source] = infos.skipped.get(source, 0) + 1
        elif scene_id in infos:
            problems.add(f"{path}: {one_line(name)}: field 'sample_idx' is there twice; remove one of the two scenes")
        else:
            info = problems.read(_scene, entry, scene_id, labels, _Place(path, one_line(name)))
            if info is not None:
                infos[scene_id] = info
    problems.raise_any()
    if not infos:
        raise ValueError(f"{path} holds no ScanNet scene (others: {infos.skipped}); it must be {SOURCE}")
    return infos


@dataclass(frozen=True)
class _Place:
    """Where something is, for messages."""

    path: Path
    name: str

    def error(self, field: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: {self.name}: field {field!r} {what}; copy the file again")


def _labels(categories: Any, path: Path) -> dict[int, str]:
    """Category id -> name."""
    if not isinstance(categories, dict) or not categories:
        raise ValueError(f"{path}: field 'metainfo.categories' is no dictionary of names; it must be {SOURCE}")
    labels: dict[int, str] = {}
    for name, value in categories.items():
        number = _whole(value)
        if not isinstance(name, str) or not name.strip() or number is None:
            raise ValueError(f"{path}: field 'metainfo.categories': {name!r} has no number; it must be {SOURCE}")
        if number in labels:
            raise ValueError(f"{path}: field 'metainfo.categories': {name!r} and {labels[number]!r} are both {number}")
        labels[number] = name
    return labels


def _scene(entry: Mapping[str, Any], scene_id: str, labels: dict[int, str], place: _Place) -> ScanInfo:
    try:
        check_scene_id(scene_id)
    except ValueError as error:
        raise place.error("sample_idx", str(error)) from None
    axis_align = _numbers(entry, "axis_align_matrix", (4, 4), place)
    if not np.isfinite(axis_align).all():
        raise place.error("axis_align_matrix", "holds a number that is not finite")
    instances = tuple(
        _instance(each, index, labels, place) for index, each in enumerate(_list(entry, "instances", place))
    )
    visible: dict[int, frozenset[int]] = {}
    poses: dict[int, np.ndarray] = {}
    dropped: set[int] = set()
    for image in _list(entry, "images", place):
        frame, where = _frame(image, place)
        if frame in poses or frame in dropped:
            raise place.error("images", f"has frame {frame} twice")
        pose = _numbers(image, "cam2global", (4, 4), where)
        if np.isfinite(pose).all():
            poses[frame], visible[frame] = pose, _visible(image, len(instances), where)
        else:
            dropped.add(frame)  # ScanNet marks lost tracking with -inf
    if not poses:
        raise place.error("images", f"has no frame with a finite pose ({len(dropped)} others)")
    return ScanInfo(scene_id, axis_align, visible, poses, instances, len(dropped))


def _instance(each: Any, index: int, labels: dict[int, str], place: _Place) -> InfoInstance:
    where = _Place(place.path, f"{place.name}: instances[{index}]")
    if not isinstance(each, dict):
        raise where.error("bbox_3d", "is missing")
    box = _numbers(each, "bbox_3d", (9,), where)
    if not np.isfinite(box).all():
        raise where.error("bbox_3d", "holds a number that is not finite")
    if (box[3:6] <= 0).any():
        raise where.error("bbox_3d", f"has the sizes {box[3:6].tolist()}, which must be positive")
    number, bbox_id = _whole(each.get("bbox_label_3d")), _whole(each.get("bbox_id"))
    if number not in labels:
        raise where.error("bbox_label_3d", f"is {number}, which is no category of metainfo")
    if bbox_id is None:
        raise where.error("bbox_id", "is missing or no whole number")
    return InfoInstance(index, bbox_id, labels[number], box)


def _frame(image: Any, place: _Place) -> tuple[int, _Place]:
    path = image.get("img_path") if isinstance(image, dict) else None
    match = re.search(r"(?:^|/)([0-9]{1,9})\.[A-Za-z]+$", path) if isinstance(path, str) else None
    if match is None:
        raise place.error("img_path", f"is {path!r}, which does not end in a frame's number such as 00010.jpg")
    return int(match[1]), _Place(place.path, f"{place.name}: frame {match[1]}")


def _visible(image: Mapping[str, Any], count: int, where: _Place) -> frozenset[int]:
    values = image.get("visible_instance_ids")
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise where.error("visible_instance_ids", "is missing or no list")
    indices = [_whole(value) for value in values]
    for value, index in zip(values, indices, strict=True):
        if index is None or not 0 <= index < count:
            raise where.error("visible_instance_ids", f"names instance {value!r}; the scene has {count}, from 0")
    return frozenset(index for index in indices if index is not None)


def _list(entry: Mapping[str, Any], field: str, place: _Place) -> list[Any]:
    value = entry.get(field)
    if not isinstance(value, list):
        raise place.error(field, "is missing or no list")
    return value


def _numbers(entry: Mapping[str, Any], field: str, shape: tuple[int, ...], place: _Place) -> np.ndarray:
    """A float64 array of that shape, nan and inf included."""
    try:
        value = np.array(entry.get(field), dtype=np.float64, subok=False)
    except (TypeError, ValueError):
        raise place.error(field, f"is missing or does not hold numbers {list(shape)}") from None
    if value.shape != shape:
        raise place.error(field, f"has the shape {list(value.shape)} instead of {list(shape)}")
    return value


def _whole(value: Any) -> int | None:
    """A whole number as a Python int; None if it is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        return None
    return int(value)
