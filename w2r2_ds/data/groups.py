"""ScanRefer's unique/multiple, by each map from names to classes.

An object is *unique* if no other distinct annotated object of its scene has its class, else *multiple*. All annotations
of a split decide, not only those that are scored. Two maps are in use and give other counts, mainly because the first
puts walls and floors into "others" and the second keeps them apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from w2r2_ds.data.labels import LabelMap

# The 17 named classes of ScanNet's detection benchmark as ScanRefer spells them.
SCANNET_CLASSES = (
    *("cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk"),
    *("curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"),
)
NYU40_SPELLING = {"refridgerator": "refrigerator"}
"""ScanNet's table of labels has NYU40's spelling, ScanRefer's own copy of it the one above: both mean the class."""
UNIQUE, MULTIPLE = "unique", "multiple"
OTHERS = len(SCANNET_CLASSES)
"""Class of everything that is none of ScanNet's 17 named ones."""

VIDEO3DLLM_IDS = frozenset((*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39))
OTHER_FURNITURE = 39


Id = TypeVar("Id", int, str, covariant=True)


class Annotated(Protocol[Id]):
    """What is looked at of an annotation; its object is a number, or the digits of one."""

    @property
    def scene_id(self) -> str: ...
    @property
    def object_id(self) -> Id: ...
    @property
    def object_name(self) -> str: ...


def scannet_class(object_name: str, labels: LabelMap) -> int:
    """0..16 for ScanNet's named classes, 17 for others or unknown names.

    daveredrum/ScanRefer ``lib/dataset.py``: ``_get_raw2label``, ``_get_unique_multiple_lookup``.
    """
    _, name = labels.get(object_name.replace("_", " "), (0, ""))
    name = NYU40_SPELLING.get(name, name)
    return SCANNET_CLASSES.index(name) if name in SCANNET_CLASSES else OTHERS


def nyu40_class(object_name: str, labels: LabelMap) -> int:
    """NYU40 id, 39 for ids outside ``VIDEO3DLLM_IDS`` or unknown names.

    LaVi-Lab/Video-3D-LLM ``scripts/3d/preprocessing/process_scanrefer.py``: ``add_unique_multiple_labels_to_json``.
    """
    number, _ = labels.get(object_name.replace("_", " "), (OTHER_FURNITURE, ""))
    return number if number in VIDEO3DLLM_IDS else OTHER_FURNITURE


def groups(
    annotations: Iterable[Annotated[Id]], labels: LabelMap, class_of: Callable[[str, LabelMap], int]
) -> dict[tuple[str, Id], str]:
    """(scene, object) -> ``unique`` or ``multiple``.

    Args:
        annotations: all of one split.
        labels: see ``LabelMap``.
        class_of: ``scannet_class`` or ``nyu40_class``.
    """
    classes: dict[tuple[str, Id], int] = {}
    members: defaultdict[tuple[str, int], set[Id]] = defaultdict(set)
    for each in annotations:
        # As in ScanRefer, the first annotation of an object decides its class.
        number = classes.setdefault((each.scene_id, each.object_id), class_of(each.object_name, labels))
        members[each.scene_id, number].add(each.object_id)
    return {
        (scene, name): UNIQUE if len(members[scene, number]) == 1 else MULTIPLE
        for (scene, name), number in classes.items()
    }
