"""Axis-aligned instance boxes from ScanNet's meshes and their annotations, as ScanRefer computes them.

Input files below ``scans/SCENE/``, all from ScanNet's download script::

    SCENE_vh_clean_2.ply                     the mesh whose vertices are annotated, raw world, metres
    SCENE_vh_clean_2.0.010000.segs.json      segIndices: the segment of every vertex
    SCENE.aggregation.json                   segGroups: objectId, label and segments of every object
    SCENE.txt                                axisAlignment

and ``scannetv2-labels.combined.tsv``. ``SCENE_vh_clean.aggregation.json`` has segment ids of another, finer mesh and is
never read. As in daveredrum/ScanRefer ``load_scannet_data.py``, vertices are aligned in float64 and stored as float32,
a segment that is listed for two objects belongs to the later one, and a box spans the minimum and maximum coordinates
of an object's vertices. Two differences: ScanRefer removes walls, floors and ceilings afterwards; here they are kept,
since a description may refer to one ("closet wall"). ScanNet lists some objects twice, with the same segments; in
ScanRefer only the later one has a box, here both have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trimesh
from pydantic import Field, TypeAdapter

from w2r2_ds.data.sources.cameras import read_alignment
from w2r2_ds.data.sources.labels import LabelMap, read_labels
from w2r2_ds.data.sources.scannet import alignment_file, check_scene_id, is_scene_id
from w2r2_ds.data.sources.validation import FrozenModel, validate
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.json_io import read_json, read_text
from w2r2_ds.utils.findings import Finding
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
    segments_file: str = Field("", alias="segmentsFile")
    groups: list[_Group] = Field(alias="segGroups", min_length=1)


class _Segmentation(FrozenModel):
    segments: list[Annotated[int, Field(strict=True, lt=2**62)]] = Field(alias="segIndices", min_length=1)


_GROUPS, _SEGMENTS = TypeAdapter(_Aggregation), TypeAdapter(_Segmentation)


@dataclass(frozen=True)
class BoxesSummary:
    """Result of `write_all_boxes`.

    Attributes:
        written: number of files written.
        existing: number of files that existed.
        findings: objects of the written files that have no box, or whose annotation is unusual.
    """

    written: int
    existing: int
    findings: tuple[Finding, ...]


def boxes_file(root: Path | str, scene_id: str) -> Path:
    """Path of a scene's boxes."""
    return Path(root) / "scannet_data" / f"{scene_id}_aligned_bbox.npy"


def write_boxes(root: Path | str, scene_id: str) -> list[Finding]:
    """Compute the boxes of one scene and write ``scannet_data/SCENE_aligned_bbox.npy``, replaced atomically.

    The file has ``[N, 8]`` float64, cx cy cz dx dy dz label_id object_id (axis-aligned world, metres), one row per
    object, sorted by object id; a row of zeros, as ScanRefer writes it, for an object without a box.

    Args:
        root: data root, see ``data/sources/scannet.py``.
        scene_id: ScanNet scene name.

    Returns:
        Objects that have no box or are listed twice, labels without a row in the table, segments without a vertex.

    Raises:
        ValueError: a file of ScanNet is missing, malformed, of another scene or of another mesh; or no object has a
            box.
    """
    root = Path(root)
    folder = root / "scans" / check_scene_id(scene_id)
    segments_file = folder / f"{scene_id}_vh_clean_2.0.010000.segs.json"
    groups = _read_groups(folder / f"{scene_id}.aggregation.json", segments_file.name)
    segments = _read_segments(segments_file)
    mesh_file = folder / f"{scene_id}_vh_clean_2.ply"
    vertices = _aligned(_read_vertices(mesh_file), read_alignment(folder / f"{scene_id}.txt"))
    if len(vertices) != len(segments):
        raise ValueError(
            f"{segments_file} has {len(segments)} segIndices, but {mesh_file.name} {len(vertices)} vertices; one of "
            "them is of another scene or mesh, so download both again"
        )
    rows, findings = _rows(vertices, segments, groups, read_labels(root))
    if not rows.any():
        raise ValueError(
            f"{segments_file}: no object of {scene_id} has a box ({'; '.join(f.kind for f in findings)}); download "
            "the scene's files again"
        )
    path = boxes_file(root, scene_id)
    path.parent.mkdir(exist_ok=True)
    with atomic_io.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows)  # to an open file: for a path, np.save would append .npy to the temporary name
    return [Finding(f.kind, f"{scene_id}: {f.example}", f.count) for f in findings]


def _rows(
    vertices: np.ndarray, segments: np.ndarray, groups: Sequence[_Group], labels: LabelMap
) -> tuple[np.ndarray, list[Finding]]:
    """Rows ``[N, 8]`` sorted by object id, from vertices ``[V, 3]`` float32 and their segments ``[V]``."""
    object_of_segment = {segment: group.object_id for group in groups for segment in group.segments}
    # Object of every vertex, looked up once per distinct segment; -1 without an object.
    distinct, inverse = np.unique(segments, return_inverse=True)
    object_ids = np.array([object_of_segment.get(int(segment), -1) for segment in distinct], dtype=np.int64)[inverse]
    findings = []
    unknown = sorted(set(object_of_segment) - set(distinct.tolist()))
    if unknown:
        example = f"segment {unknown[0]} of object {object_of_segment[unknown[0]]}"
        findings.append(Finding("segment ids that no vertex has", example, len(unknown)))
    rows = np.zeros((len(groups), 8))
    for row, group in zip(rows, sorted(groups, key=lambda group: group.object_id), strict=True):
        name = f"object {group.object_id} ({one_line(group.label)})"
        points = vertices[object_ids == group.object_id]
        if not len(points):  # later objects have all its segments, or it has none
            points = vertices[np.isin(segments, group.segments)]
            if len(points):
                findings.append(
                    Finding("objects whose segments are listed again for another object; both have a box", name)
                )
        if not len(points):
            findings.append(Finding("objects without vertices, which have no box", name))
            continue
        low, high = points.min(axis=0), points.max(axis=0)
        if (high <= low).any():
            findings.append(Finding("flat objects, which have no box", f"{name} of the size {(high - low).tolist()}"))
            continue
        if group.label not in labels:
            findings.append(Finding("objects whose label is not in the table of labels (label id 0)", name))
        row[:] = *((low + high) / 2), *(high - low), labels.get(group.label, (0, ""))[0], group.object_id
    return rows, findings


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


def _read_groups(path: Path, segments_file: str) -> list[_Group]:
    """Annotated objects of a scene, in the order of the file.

    Args:
        path: ``SCENE.aggregation.json``.
        segments_file: name of the file whose segments the objects must refer to.

    Raises:
        ValueError: the file is missing or malformed, refers to another segments file, or repeats an object id.
    """
    if not path.is_file():
        # A frequent mistake: only the annotation of the fine mesh was downloaded.
        others = sorted(other.name for other in path.parent.glob("*.aggregation.json"))
        beside = f" ({', '.join(others)} refers to the fine mesh and cannot replace it)" if others else ""
        raise ValueError(f"{path} does not exist{beside}; it must be {SOURCE}")
    aggregation = validate(_GROUPS, read_json(path, SOURCE), path)
    named = aggregation.segments_file.removeprefix("scannet.")
    if named and named != segments_file:
        raise ValueError(
            f"{path}: field 'segmentsFile' is {one_line(aggregation.segments_file)}, but the segments that are read "
            f"are those of {segments_file}; download {path.name} of this scene again"
        )
    groups: dict[int, _Group] = {}
    for index, group in enumerate(aggregation.groups):
        if group.object_id in groups:
            raise ValueError(
                f"{path}: field 'segGroups[{index}].objectId' repeats {group.object_id}; download the file again"
            )
        groups[group.object_id] = group
    return list(groups.values())


def write_all_boxes(
    root: Path | str, scenes: Sequence[str] = (), workers: int = 1, overwrite: bool = False
) -> BoxesSummary:
    """Write ``scannet_data/SCENE_aligned_bbox.npy`` of all scenes that lack it.

    Args:
        root: data root in ScanNet's layout.
        scenes: names of scenes; all below ``ROOT/scans`` if empty.
        workers: number of processes.
        overwrite: replace existing files.

    Raises:
        ValueError: there are no scenes, or some have errors; the message has the first ten. The files of all other
            scenes are written.
    """
    root, folder = Path(root), Path(root) / "scans"
    skipped: list[Finding] = []
    if not scenes:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        scenes = [name for name in names if is_scene_id(name)]
        others = [one_line(name) for name in names if not is_scene_id(name)]  # such as .cache, or a copy of a scan
        skipped += [
            Finding("folders in scans/ whose name is not that of a scene, which were skipped", name) for name in others
        ]
    if not scenes:
        raise ValueError(
            f"{folder} holds no scenes; correct --root, or get ScanNet's scans first (docs/guides/own-dataset.md)."
        )
    hidden = [name for name in scenes if is_hidden_test_scan(root, check_scene_id(name))]
    scenes = [name for name in scenes if name not in set(hidden)]
    existing = {name for name in scenes if boxes_file(root, name).is_file()}
    todo = [(root, name) for name in scenes if overwrite or name not in existing]
    problems: dict[str, str] = {}
    findings: dict[str, list[Finding]] = {}
    with progress("boxes: scenes", len(todo)) as advance:
        for scene_id, found, problem in run_all(_write, todo, workers):
            findings[scene_id] = found
            if problem:
                problems[scene_id] = problem
            advance()
    if problems:
        messages = [problems[name] for name in sorted(problems)]
        raise ValueError(listed(f"{len(problems)} of {len(scenes)} scenes have no boxes yet", messages))
    skipped += [Finding("scans of ScanNet's hidden test split, which have no boxes", name) for name in hidden]
    # Scenes finish in any order.
    skipped += [each for name in sorted(findings) for each in findings[name]]
    return BoxesSummary(len(todo), len(scenes) - len(todo), tuple(skipped))


def is_hidden_test_scan(root: Path, scene_id: str) -> bool:
    """Whether a scan has neither annotated objects nor an alignment, as those of ScanNet's hidden test split.

    A scan whose description cannot be read is not hidden: the error belongs to its boxes, and not to those of all.
    """
    folder, description = root / "scans" / scene_id, alignment_file(root, scene_id)
    if any(folder.glob("*.aggregation.json")):
        return False
    try:
        return "axisAlignment" not in read_text(description)
    except ValueError:
        return False


def _write(root: Path, scene_id: str) -> tuple[str, list[Finding], str]:
    """Write the boxes of one scene (in a worker process); returns its name, findings and the error, empty if none."""
    try:
        return scene_id, write_boxes(root, scene_id), ""
    except ValueError as error:
        return scene_id, [], str(error)
