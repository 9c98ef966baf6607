"""Axis-aligned instance boxes from ScanNet's meshes and their annotations, as ScanRefer computes them.

Input files below ``scans/SCENE/``, all from ScanNet's download script::

    SCENE_vh_clean_2.ply                     the mesh whose vertices are annotated, raw world, metres
    SCENE_vh_clean_2.0.010000.segs.json      segIndices: the segment of every vertex
    SCENE_vh_clean.aggregation.json          segGroups: objectId, label and segments of every object
      or SCENE.aggregation.json
    SCENE.txt                                axisAlignment

and ``scannetv2-labels.combined.tsv``. As in daveredrum/ScanRefer ``load_scannet_data.py``, vertices are aligned in
float64 and stored as float32, a segment that is listed for two objects belongs to the later one, and a box spans the
minimum and maximum coordinates of an object's vertices. ScanRefer removes walls, floors and ceilings afterwards; here
they are kept, since a description may refer to one ("closet wall").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trimesh
from pydantic import Field, TypeAdapter

from w2r2_ds.data.sources.labels import LabelMap, read_labels
from w2r2_ds.data.sources.scannet import check_scene_id, read_alignment
from w2r2_ds.data.sources.validation import FrozenModel, validate
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.json_io import read_json
from w2r2_ds.utils.parallel import listed, run_all
from w2r2_ds.utils.progress import progress
from w2r2_ds.utils.sanitize import one_line

SOURCE = "a file of ScanNet, which its own download script fetches"

_Whole = Annotated[int, Field(strict=True)]


class _Group(FrozenModel):
    object_id: Annotated[int, Field(strict=True, ge=0)] = Field(alias="objectId")
    label: str
    segments: tuple[_Whole, ...]


class _Aggregation(FrozenModel):
    groups: list[_Group] = Field(alias="segGroups", min_length=1)


class _Segmentation(FrozenModel):
    segments: list[Annotated[int, Field(strict=True, lt=2**62)]] = Field(alias="segIndices", min_length=1)


_GROUPS, _SEGMENTS = TypeAdapter(_Aggregation), TypeAdapter(_Segmentation)


def write_boxes(root: Path | str, scene_id: str) -> Path:
    """Compute the boxes of one scene and write ``scannet_data/SCENE_aligned_bbox.npy``, replaced atomically.

    Args:
        root: data root, see ``data/sources/scannet.py``.
        scene_id: ScanNet scene name.

    Returns:
        Path of the file: ``[N, 8]`` float64, cx cy cz dx dy dz label_id object_id (axis-aligned world, metres), one row
        per object, sorted by object id; a row of zeros for an object without vertices.

    Raises:
        ValueError: a file of ScanNet is missing, malformed or of another scene.
    """
    root = Path(root)
    folder = root / "scans" / check_scene_id(scene_id)
    groups = _read_groups(_aggregation(folder, scene_id))
    segments_file = folder / f"{scene_id}_vh_clean_2.0.010000.segs.json"
    segments = _read_segments(segments_file)
    mesh_file = folder / f"{scene_id}_vh_clean_2.ply"
    vertices = _aligned(_read_vertices(mesh_file), read_alignment(folder / f"{scene_id}.txt"))
    if len(vertices) != len(segments):
        raise ValueError(
            f"{segments_file} has {len(segments)} segIndices, but {mesh_file.name} {len(vertices)} vertices; one of "
            "them is not this scene's, so download both again"
        )
    rows = _rows(vertices, segments, groups, read_labels(root))
    if not rows.any():
        raise ValueError(f"{segments_file} has no vertex of any object of {scene_id}; download the scene's files again")
    for row, group in zip(rows, sorted(groups, key=lambda group: group.object_id), strict=True):
        if row.any() and (row[3:6] <= 0).any():
            raise ValueError(
                f"{mesh_file}: object {group.object_id} ({one_line(group.label)}) is flat, with the size "
                f"{row[3:6].tolist()}; download the scene's files again"
            )
    path = root / "scannet_data" / f"{scene_id}_aligned_bbox.npy"
    path.parent.mkdir(exist_ok=True)
    with atomic_io.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows)  # to an open file: for a path, np.save would append .npy to the temporary name
    return path


def _rows(vertices: np.ndarray, segments: np.ndarray, groups: list[_Group], labels: LabelMap) -> np.ndarray:
    """Rows ``[N, 8]`` sorted by object id, from vertices ``[V, 3]`` float32 and their segments ``[V]``."""
    object_of_segment = {segment: group.object_id for group in groups for segment in group.segments}
    # Object of every vertex, looked up once per distinct segment; -1 without an object.
    distinct, inverse = np.unique(segments, return_inverse=True)
    object_ids = np.array([object_of_segment.get(int(segment), -1) for segment in distinct], dtype=np.int64)[inverse]
    rows = np.zeros((len(groups), 8))
    for row, group in zip(rows, sorted(groups, key=lambda group: group.object_id), strict=True):
        points = vertices[object_ids == group.object_id]
        if len(points):
            low, high = points.min(axis=0), points.max(axis=0)
            row[:] = *((low + high) / 2), *(high - low), labels.get(group.label, (0, ""))[0], group.object_id
    return rows


def _aligned(vertices: np.ndarray, axis_align: np.ndarray) -> np.ndarray:
    """Vertices ``[V, 3]`` float32 in the axis-aligned world, from ``[V, 3]`` float64 in the raw world."""
    return (vertices @ axis_align[:3, :3].T + axis_align[:3, 3]).astype(np.float32)


def _read_vertices(path: Path) -> np.ndarray:
    """Vertices ``[V, 3]`` float64 of a PLY mesh, binary or text, in the order of the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it must be {SOURCE}")
    try:
        # process=True would merge vertices, but segIndices refers to their order in the file. Materials are skipped,
        # because the path of a texture in an untrusted mesh may lead anywhere.
        mesh: Any = trimesh.load(path, file_type="ply", process=False, skip_materials=True)
        vertices = np.asarray(mesh.vertices, dtype=np.float64)
    except Exception as error:  # trimesh raises many types of errors on a truncated file
        raise ValueError(f"{path} is no readable mesh ({error}); download it again") from None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not len(vertices) or not np.isfinite(vertices).all():
        raise ValueError(f"{path} has no vertices, or some that are not finite; download it again")
    return vertices


def _read_segments(path: Path) -> np.ndarray:
    """``[V]`` int64: the segment of each vertex."""
    return np.array(validate(_SEGMENTS, read_json(path, SOURCE), path).segments, dtype=np.int64)


def _aggregation(folder: Path, scene_id: str) -> Path:
    """Path of the aggregation file. ScanRefer reads the first candidate; both have the same objects."""
    candidates = [folder / f"{scene_id}{ending}.aggregation.json" for ending in ("_vh_clean", "")]
    return next((path for path in candidates if path.is_file()), candidates[1])


def _read_groups(path: Path) -> list[_Group]:
    """Annotated objects of a scene, in the order of the file; raises ``ValueError`` for a repeated id."""
    groups: dict[int, _Group] = {}
    for index, group in enumerate(validate(_GROUPS, read_json(path, SOURCE), path).groups):
        if group.object_id in groups:
            raise ValueError(
                f"{path}: field 'segGroups[{index}].objectId' repeats {group.object_id}; download the file again"
            )
        groups[group.object_id] = group
    return list(groups.values())


def write_all_boxes(
    root: Path | str, scenes: Sequence[str] = (), workers: int = 1, overwrite: bool = False
) -> tuple[int, int]:
    """Write ``scannet_data/SCENE_aligned_bbox.npy`` of all scenes that lack it.

    Args:
        root: data root in ScanNet's layout.
        scenes: names of scenes; all below ``ROOT/scans`` if empty.
        workers: number of processes.
        overwrite: replace existing files.

    Returns:
        Number of files written, and number of files that existed.

    Raises:
        ValueError: there are no scenes, or some have errors; the message has the first ten. The files of all other
            scenes are written.
    """
    root, folder = Path(root), Path(root) / "scans"
    if not scenes:
        scenes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not scenes:
        raise ValueError(
            f"{folder} holds no scenes; correct --root, or get ScanNet's scans first (docs/guides/own-dataset.md)."
        )
    existing = {name for name in scenes if (root / "scannet_data" / f"{name}_aligned_bbox.npy").is_file()}
    todo = [(root, name) for name in scenes if overwrite or name not in existing]
    problems: dict[str, str] = {}
    with progress("boxes: scenes", len(todo)) as advance:
        for scene_id, problem in run_all(_write, todo, workers):
            if problem:
                problems[scene_id] = problem
            advance()
    if problems:
        messages = [problems[name] for name in sorted(problems)]
        raise ValueError(listed(f"{len(problems)} of {len(scenes)} scenes have no boxes yet", messages))
    return len(todo), len(scenes) - len(todo)


def _write(root: Path, scene_id: str) -> tuple[str, str]:
    """Write the boxes of one scene (in a worker process); returns its name and the error message, empty if none."""
    try:
        write_boxes(root, scene_id)
    except ValueError as error:
        return scene_id, str(error)
    return scene_id, ""
