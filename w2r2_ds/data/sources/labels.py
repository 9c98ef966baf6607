"""ScanNet's label table (raw category -> NYU40 class), and the unique/multiple split of ScanRefer.

``scannetv2-labels.combined.tsv`` is tab-separated; ``raw_category``, ``nyu40id`` and ``nyu40class`` are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

LABELS_FILE = "scannetv2-labels.combined.tsv"
LabelMap = Mapping[str, tuple[int, str]]
"""Raw category -> (nyu40id, nyu40class)."""
_COLUMNS = ("raw_category", "nyu40id", "nyu40class")
_SOURCE = "ScanNet's table of labels, which its own download script fetches"


def read_labels(root: Path | str) -> dict[str, tuple[int, str]]:
    """Read ``scannetv2-labels.combined.tsv`` below `root`.

    Of several rows of one raw category the last one is used, as in ScanRefer's and Video-3D-LLM's code.

    Raises:
        ValueError: the file is missing or not UTF-8, or lacks one of the three columns (in its header or in a row).
    """
    path = Path(root) / LABELS_FILE
    try:
        # Not the csv module: a quote is an ordinary character in this file.
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; it must be {_SOURCE}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 ({error}); it must be {_SOURCE}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); it must be {_SOURCE}") from None
    header = lines[0].split("\t") if lines else []
    for column in _COLUMNS:
        if column not in header:
            raise ValueError(f"{path}: line 1 has no column {column!r}; it must be {_SOURCE}")
    places = [header.index(column) for column in _COLUMNS]
    labels = {}
    for line, row in enumerate(lines[1:], start=2):
        cells = row.split("\t")
        raw, number, name = (cells[place] if place < len(cells) else "" for place in places)
        for column, value in zip(_COLUMNS, (raw, number, name), strict=True):
            if not value.strip():
                raise ValueError(f"{path}: line {line}: field {column!r} is missing or empty; copy the file again")
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"{path}: line {line}: field 'nyu40id' is {number!r}, no number; copy the file again")
        labels[raw] = int(number), name
    if not labels:
        raise ValueError(f"{path} has a header, but no rows; it must be {_SOURCE}")
    return labels


# The 17 named classes of ScanNet's detection benchmark as ScanRefer spells them.
SCANNET_CLASSES = (
    *("cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk"),
    *("curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"),
)
NYU40_SPELLING = {"refridgerator": "refrigerator"}
"""Spelling in ScanNet's label table -> spelling in ScanRefer's copy of it, which ``SCANNET_CLASSES`` has."""
UNIQUE, MULTIPLE = "unique", "multiple"
OTHERS = len(SCANNET_CLASSES)
"""Class of all other categories."""
# NYU40 ids that Video-3D-LLM distinguishes; every other one counts as otherfurniture
VIDEO3DLLM_IDS = frozenset((*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39))
OTHER_FURNITURE = 39
Id = TypeVar("Id", int, str, covariant=True)


class Annotated(Protocol[Id]):
    """The fields that `groups` reads; an object id is an int, or a string of digits."""

    @property
    def scene_id(self) -> str: ...
    @property
    def object_id(self) -> Id: ...
    @property
    def object_name(self) -> str: ...


def scannet_class(object_name: str, labels: LabelMap) -> int:
    """Index 0 to 16 of a named class of ScanNet; 17 for other classes and unknown names.

    Source: daveredrum/ScanRefer ``lib/dataset.py``: ``_get_raw2label``, ``_get_unique_multiple_lookup``.
    """
    _, name = labels.get(object_name.replace("_", " "), (0, ""))
    name = NYU40_SPELLING.get(name, name)
    return SCANNET_CLASSES.index(name) if name in SCANNET_CLASSES else OTHERS


def nyu40_class(object_name: str, labels: LabelMap) -> int:
    """NYU40 id; 39 for ids outside ``VIDEO3DLLM_IDS`` and unknown names.

    Source: LaVi-Lab/Video-3D-LLM ``scripts/3d/preprocessing/process_scanrefer.py``:
    ``add_unique_multiple_labels_to_json``.
    """
    number, _ = labels.get(object_name.replace("_", " "), (OTHER_FURNITURE, ""))
    return number if number in VIDEO3DLLM_IDS else OTHER_FURNITURE


def groups(
    annotations: Iterable[Annotated[Id]], labels: LabelMap, class_of: Callable[[str, LabelMap], int]
) -> dict[tuple[str, Id], str]:
    """(scene, object) -> ``unique`` if it is the only annotated object of its class in the scene, else ``multiple``.

    Args:
        annotations: all of one split.
        labels: see ``LabelMap``.
        class_of: ``scannet_class`` or ``nyu40_class``.
    """
    classes: dict[tuple[str, Id], int] = {}
    members: defaultdict[tuple[str, int], set[Id]] = defaultdict(set)
    for each in annotations:
        # As in ScanRefer, an object has the class of its first annotation.
        number = classes.setdefault((each.scene_id, each.object_id), class_of(each.object_name, labels))
        members[each.scene_id, number].add(each.object_id)
    return {
        (scene, name): UNIQUE if len(members[scene, number]) == 1 else MULTIPLE
        for (scene, name), number in classes.items()
    }
