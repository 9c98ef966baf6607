"""ScanNet's label table (raw category -> NYU40 class), and ScanRefer's groups ``unique`` and ``multiple``.

``scannetv2-labels.combined.tsv`` is tab-separated; the columns ``raw_category``, ``nyu40id`` and ``nyu40class`` are
used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from w2r2_ds.utils.files.json_io import read_text

LABELS_FILE = "scannetv2-labels.combined.tsv"
LabelMap = Mapping[str, tuple[int, str]]
"""Raw category -> (nyu40id, nyu40class)."""
_COLUMNS = ("raw_category", "nyu40id", "nyu40class")
_SOURCE = "ScanNet's table of labels, which its own download script fetches"


# The 17 named classes of ScanNet's detection benchmark, in ScanRefer's spelling.
SCANNET_CLASSES = (
    *("cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk"),
    *("curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"),
)
NYU40_SPELLING = {"refridgerator": "refrigerator"}
"""Spelling in ScanNet's label table -> spelling in ScanRefer's copy of it, which ``SCANNET_CLASSES`` uses."""
UNIQUE, MULTIPLE = "unique", "multiple"
OTHERS = len(SCANNET_CLASSES)
"""Class of all categories without a named class."""
# NYU40 ids that Video-3D-LLM distinguishes; all others count as otherfurniture.
VIDEO3DLLM_IDS = frozenset((*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39))
OTHER_FURNITURE = 39
Id = TypeVar("Id", int, str, covariant=True)


class ObjectAnnotation(Protocol[Id]):
    """Fields of an annotation that `unique_or_multiple` uses; an object id is an int, or a string of digits."""

    @property
    def scene_id(self) -> str: ...
    @property
    def object_id(self) -> Id: ...
    @property
    def object_name(self) -> str: ...


def read_labels(root: Path | str) -> dict[str, tuple[int, str]]:
    """Read ``scannetv2-labels.combined.tsv`` below `root`.

    Of several rows of one raw category the last one is used, as in ScanRefer's and Video-3D-LLM's code.

    Returns:
        Raw category -> (nyu40id, nyu40class).

    Raises:
        ValueError: the file is missing, unreadable or not UTF-8; a column is missing; or a row lacks a field or has an
            invalid nyu40id.
    """
    path = Path(root) / LABELS_FILE
    lines = read_text(path, _SOURCE).splitlines()  # not the csv module: a quote is an ordinary character in this file
    header = lines[0].split("\t") if lines else []
    for column in _COLUMNS:
        if column not in header:
            raise ValueError(f"{path}: line 1 has no column {column!r}; it must be {_SOURCE}")
    columns = [header.index(column) for column in _COLUMNS]
    labels = {}
    for line, row in enumerate(lines[1:], start=2):
        cells = row.split("\t")
        raw, number, name = (cells[column] if column < len(cells) else "" for column in columns)
        for field, value in zip(_COLUMNS, (raw, number, name), strict=True):
            if not value.strip():
                raise ValueError(f"{path}: line {line}: field {field!r} is missing or empty; copy the file again")
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"{path}: line {line}: field 'nyu40id' is {number!r}, no number; copy the file again")
        labels[raw] = int(number), name
    if not labels:
        raise ValueError(f"{path} has a header, but no rows; it must be {_SOURCE}")
    return labels


def scannet_class(object_name: str, labels: LabelMap) -> int:
    """Index of the object's class in ``SCANNET_CLASSES``, 0 to 16; 17 for other classes and unknown names.

    Source: daveredrum/ScanRefer ``lib/dataset.py``: ``_get_raw2label``, ``_get_unique_multiple_lookup``.
    """
    _, name = labels.get(object_name.replace("_", " "), (0, ""))
    name = NYU40_SPELLING.get(name, name)
    return SCANNET_CLASSES.index(name) if name in SCANNET_CLASSES else OTHERS


def nyu40_class(object_name: str, labels: LabelMap) -> int:
    """NYU40 id of the object's class; 39 for ids outside ``VIDEO3DLLM_IDS`` and unknown names.

    Source: LaVi-Lab/Video-3D-LLM ``scripts/3d/preprocessing/process_scanrefer.py``:
    ``add_unique_multiple_labels_to_json``.
    """
    number, _ = labels.get(object_name.replace("_", " "), (OTHER_FURNITURE, ""))
    return number if number in VIDEO3DLLM_IDS else OTHER_FURNITURE


def unique_or_multiple(
    annotations: Iterable[ObjectAnnotation[Id]], labels: LabelMap, class_of: Callable[[str, LabelMap], int]
) -> dict[tuple[str, Id], str]:
    """Assign annotated objects to ScanRefer's groups ``unique`` and ``multiple``.

    Args:
        annotations: all annotations of a split.
        labels: label table, see ``LabelMap``.
        class_of: ``scannet_class`` or ``nyu40_class``.

    Returns:
        (scene id, object id) -> ``unique`` if no other annotated object of the scene has the object's class, else
        ``multiple``.
    """
    classes: dict[tuple[str, Id], int] = {}
    members: defaultdict[tuple[str, int], set[Id]] = defaultdict(set)  # (scene id, class) -> object ids
    for annotation in annotations:
        key = annotation.scene_id, annotation.object_id
        # As in ScanRefer, an object has the class of its first annotation.
        object_class = classes.setdefault(key, class_of(annotation.object_name, labels))
        members[annotation.scene_id, object_class].add(annotation.object_id)
    return {
        (scene_id, object_id): UNIQUE if len(members[scene_id, object_class]) == 1 else MULTIPLE
        for (scene_id, object_id), object_class in classes.items()
    }
