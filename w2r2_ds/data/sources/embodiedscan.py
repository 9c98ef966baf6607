"""Reader of EmbodiedScan's annotations of ScanNet: the visible objects of every frame, and their oriented boxes.

``embodiedscan_infos_{train,val}.pkl``::

    {"metainfo": {"categories": {"chair": 4, ...}},
     "data_list": [{"sample_idx": "scannet/scene0415_00", "axis_align_matrix": [4, 4],
                    "images": [{"img_path": "scannet/posed_images/scene0415_00/00010.jpg", "cam2global": [4, 4],
                                "visible_instance_ids": [0, 3]}, ...],
                    "instances": [{"bbox_3d": [9], "bbox_label_3d": 4, "bbox_id": 7}, ...]}, ...]}

``visible_instance_ids`` are *indices into the list* ``instances``, not values of ``bbox_id``: EmbodiedScan's data set
class sets ``mask[ids]`` of a mask with the length of that list (``embodiedscan_dataset.py``: ``_ids2masks``), and
VG-LLM reads ``sample["instances"][id]`` (``process_threedod.py``). An index outside the list is an error.

A broken instance (a flat box, a NaN, an unknown category) is skipped in its scene, a broken scene is skipped in the
file; both are recorded, so that only the preparation of a task that needs them mentions them.

* ``bbox_3d``: centre and size in metres, ZXY angles in radians (``boxes3d/transforms.py``), in the axis-aligned world.
* ``cam2global``: camera pose, OpenCV camera to *raw* world.
* ``axis_align_matrix``: raw to axis-aligned world.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from w2r2_ds.data.sources.numpy_unpickler import load_numpy_pickle
from w2r2_ds.data.sources.scannet import check_scene_id
from w2r2_ds.data.sources.validation import FrozenModel, Integer, Name, error_lines, raise_problems, validate
from w2r2_ds.utils.sanitize import one_line

SOURCE = "EmbodiedScan's infos, which its authors send on request"
SCANNET_SOURCE = "scannet"


@dataclass(frozen=True)
class InfoInstance:
    """One annotated object of a scene.

    Attributes:
        index: index in the file's list of instances; ``ScanInfo.visible`` refers to it.
        bbox_id: EmbodiedScan's id of the box; no other field refers to it.
        label: name of the object's category.
        box: ``[9]`` float64 centre, size and ZXY angles in the axis-aligned world, metres and radians.
    """

    index: int
    bbox_id: int
    label: str
    box: np.ndarray


@dataclass(frozen=True)
class ScanInfo:
    """EmbodiedScan's annotations of one scene.

    Attributes:
        scene_id: ScanNet scene name.
        axis_align: ``[4, 4]`` float64, raw world to axis-aligned world.
        visible: frame number (in the image's file name) -> ``InfoInstance.index`` of the visible objects.
        poses: frame number -> ``[4, 4]`` float64, OpenCV camera to *raw* world, metres.
        instances: ``InfoInstance.index`` -> object of the scene, in the file's order.
        broken_instances: one message for each instance that was skipped.
    """

    scene_id: str
    axis_align: np.ndarray
    visible: dict[int, frozenset[int]]
    poses: dict[int, np.ndarray]
    instances: dict[int, InfoInstance]
    broken_instances: tuple[str, ...] = ()


class Infos(dict[str, ScanInfo]):
    """Content of an infos file: scene id -> annotations of the scene, for the scenes of ScanNet.

    Attributes:
        skipped: name of another data set (3RScan, Matterport3D) -> number of its scenes in the file.
        broken: scene id -> message, for the scenes that were skipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, int] = {}
        self.broken: dict[str, str] = {}


def _array(*shape: int, finite: bool = True) -> Any:
    """pydantic type of a float64 array of a shape, from nested lists or an array; finite unless `finite` is False."""

    def convert(value: Any) -> np.ndarray:
        try:
            array = np.array(value, dtype=np.float64, subok=False)
        except (TypeError, ValueError):
            raise ValueError(f"must be numbers {list(shape)}") from None
        if array.shape != shape:
            raise ValueError(f"must have the shape {list(shape)}, not {list(array.shape)}")
        if finite and not np.isfinite(array).all():
            raise ValueError("must be finite")
        return array

    return Annotated[np.ndarray, BeforeValidator(convert)]


def _positive_sizes(box: np.ndarray) -> np.ndarray:
    if (box[3:6] <= 0).any():
        raise ValueError("sizes must be positive")
    return box


def _numbered(path: str) -> str:
    if re.search(r"(?:^|/)[0-9]{1,9}\.[A-Za-z]+$", path) is None:
        raise ValueError("must end in a frame number such as 00010.jpg")
    return path


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


class _Image(FrozenModel):
    img_path: Annotated[str, AfterValidator(_numbered)]
    cam2global: _array(4, 4, finite=False)  # type: ignore[valid-type]  # ScanNet marks lost tracking with -inf
    visible_instance_ids: Annotated[list[Integer], BeforeValidator(_as_list)]

    @property
    def frame(self) -> int:
        """Frame number in the image's file name."""
        return int(Path(self.img_path).stem)


class _Object(FrozenModel):
    bbox_3d: Annotated[_array(9), AfterValidator(_positive_sizes)]  # type: ignore[valid-type]
    bbox_label_3d: Integer
    bbox_id: Integer


class _Scene(FrozenModel):
    axis_align_matrix: _array(4, 4)  # type: ignore[valid-type]
    images: list[_Image]
    instances: list[Any]  # of `_Object`, validated one by one

    @model_validator(mode="after")
    def _check(self) -> _Scene:
        """Check that frames are unique, visible instances exist, and a frame has a valid pose."""
        frames = [image.frame for image in self.images]
        if len(set(frames)) < len(frames):
            raise ValueError(f"images: frame {next(each for each in frames if frames.count(each) > 1)} occurs twice")
        for image in self.images:
            # They are indices into `instances`, not values of bbox_id.
            outside = [index for index in image.visible_instance_ids if index >= len(self.instances)]
            if outside:
                raise ValueError(
                    f"frame {image.frame:05d}: visible_instance_ids has {outside[0]}; "
                    f"the scene has {len(self.instances)} instances, from 0"
                )
        if not any(np.isfinite(image.cam2global).all() for image in self.images):
            raise ValueError("images: no frame has a finite cam2global")
        return self


class _Metainfo(FrozenModel):
    categories: dict[Name, Integer] = Field(min_length=1)


class _Content(FrozenModel):
    metainfo: _Metainfo
    data_list: list[Any]


_CONTENT = TypeAdapter(_Content)


def read_infos(path: Path | str) -> Infos:
    """Read the ScanNet scenes of an infos file; scenes of other data sets are skipped and counted.

    Raises:
        ValueError: the file is not such a pickle, a scene has no valid name, or every scene is broken. The message has
            scene and field of the first ten errors.
    """
    path = Path(path)
    content = validate(_CONTENT, load_numpy_pickle(path, SOURCE), path)
    categories = _category_names(content.metainfo, path)
    infos = Infos()
    broken: dict[str, list[str]] = {}
    nameless = []
    for index, entry in enumerate(content.data_list):
        sample = entry.get("sample_idx") if isinstance(entry, dict) else None
        if not isinstance(sample, str):
            nameless.append(f"{path}: data_list[{index}]: field 'sample_idx' is missing")
            continue
        source, _, scene_id = sample.partition("/")
        location = f"{path}: {one_line(sample)}"
        if source != SCANNET_SOURCE:
            infos.skipped[source] = infos.skipped.get(source, 0) + 1
            continue
        try:
            check_scene_id(scene_id)
        except ValueError as error:
            nameless.append(f"{location}: {error}")
            continue
        if scene_id in infos or scene_id in broken:
            # It is unknown which of the two is right.
            infos.pop(scene_id, None)
            broken[scene_id] = [f"{location}: field 'sample_idx' occurs twice; remove one of the two scenes"]
            continue
        try:
            infos[scene_id] = _scan_info(scene_id, _Scene.model_validate(entry), categories, location)
        except ValidationError as error:
            broken[scene_id] = error_lines(error, location)
        except ValueError as error:
            broken[scene_id] = str(error).splitlines()
    if nameless or not infos:
        raise_problems(path, [*(line for lines in broken.values() for line in lines), *nameless])
    if not infos:
        raise ValueError(f"{path} holds no ScanNet scene (others: {infos.skipped}); it must be {SOURCE}")
    infos.broken = {scene_id: "\n".join(lines) for scene_id, lines in broken.items()}
    return infos


def _category_names(metainfo: _Metainfo, path: Path) -> dict[int, str]:
    """Number -> name of the categories."""
    names: dict[int, str] = {}
    for name, number in metainfo.categories.items():
        if number in names:
            raise ValueError(f"{path}: field 'metainfo.categories': {name!r} and {names[number]!r} are both {number}")
        names[number] = name
    return names


def _scan_info(scene_id: str, scene: _Scene, categories: dict[int, str], location: str) -> ScanInfo:
    """`ScanInfo` of a validated scene; frames without a finite pose and broken instances are skipped.

    Raises:
        ValueError: every instance is broken; one line each.
    """
    instances: dict[int, InfoInstance] = {}
    broken: list[str] = []
    for index, entry in enumerate(scene.instances):
        try:
            instance = _Object.model_validate(entry)
        except ValidationError as error:
            broken += error_lines(error, location, prefix=("instances", index))
            continue
        if instance.bbox_label_3d not in categories:
            broken.append(
                f"{location}: field 'instances[{index}].bbox_label_3d' is {instance.bbox_label_3d}, no category of "
                "metainfo"
            )
            continue
        label = categories[instance.bbox_label_3d]
        instances[index] = InfoInstance(index, instance.bbox_id, label, instance.bbox_3d)
    if broken and not instances:
        raise ValueError("\n".join(broken))
    tracked = [image for image in scene.images if np.isfinite(image.cam2global).all()]
    return ScanInfo(
        scene_id=scene_id,
        axis_align=scene.axis_align_matrix,
        visible={image.frame: frozenset(image.visible_instance_ids) for image in tracked},
        poses={image.frame: image.cam2global for image in tracked},
        instances=instances,
        broken_instances=tuple(broken),
    )
