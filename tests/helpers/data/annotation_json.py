"""Parse annotations and submissions of the golden files: ``ScanRefer_filtered_*.json``, ``ScanQA_v1.0_*.json``.

A file is a list of entries. An entry without a needed field raises ValueError with its index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from w2r2_ds.data.sources.labels import LabelMap, nyu40_class, scannet_class, unique_or_multiple
from w2r2_ds.evaluation.protocols.scan2cap_rules import Caption, DescribedObject
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription

Boxes = Mapping[str, Mapping[str, Sequence[float]]]
"""Scene -> object id -> ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""


class NamedObject(NamedTuple):
    """The object that a description refers to."""

    scene_id: str
    object_id: str
    object_name: str


def descriptions_from(entries: Sequence[Mapping[str, Any]], boxes: Boxes, labels: LabelMap) -> list[ScoredDescription]:
    """ScanRefer's descriptions of a whole split, in file order.

    Raises:
        ValueError: an entry lacks a field, or its object has no box.
    """
    objects = [_object(entry, number) for number, entry in enumerate(entries)]
    official = unique_or_multiple(objects, labels, scannet_class)
    nyu40 = unique_or_multiple(objects, labels, nyu40_class)
    found = []
    for number, (entry, described) in enumerate(zip(entries, objects, strict=True)):
        box = _box(boxes, described.scene_id, described.object_id, number)
        place = (described.scene_id, described.object_id)
        key = "|".join((*place, str(_field(entry, "ann_id", number))))
        class_index = scannet_class(described.object_name, labels)
        found.append(ScoredDescription(key, described.scene_id, box, official[place], nyu40[place], class_index))
    return found


def objects_from(entries: Iterable[Mapping[str, Any]], boxes: Boxes) -> list[DescribedObject]:
    """Scan2Cap's objects: ScanRefer's descriptions grouped by object, in file order.

    Raises:
        ValueError: an entry lacks a field, or its object has no box.
    """
    gathered: dict[NamedObject, list[tuple[str, tuple[str, ...]]]] = {}
    places: dict[NamedObject, tuple[float, ...]] = {}
    for number, entry in enumerate(entries):
        key = _object(entry, number)
        places.setdefault(key, _box(boxes, key[0], key[1], number))
        words = tuple(_field(entry, "token", number))
        gathered.setdefault(key, []).append((_field(entry, "description", number), words))
    return [
        DescribedObject(
            "|".join(key), tuple(text for text, _ in texts), tuple(words for _, words in texts), places[key]
        )
        for key, texts in gathered.items()
    ]


def captions_from(entries: Iterable[Mapping[str, Any]]) -> dict[str, Caption]:
    """``scene|object|name`` -> caption, with ``box``, ``token``, ``iou`` if present; the last entry of a key counts.

    Raises:
        ValueError: an entry lacks a field.
    """
    found = {}
    for number, entry in enumerate(entries):
        box, words = entry.get("box"), entry.get("token")
        found["|".join(_object(entry, number))] = Caption(
            text=_field(entry, "caption", number),
            box=None if box is None else tuple(box),
            tokens=None if words is None else tuple(words),
            iou=entry.get("iou"),
        )
    return found


def questions_from(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """ScanQA's question id -> reference answers.

    Raises:
        ValueError: an entry lacks a field (the test split has no answers), or repeats an id.
    """
    return _by_question(entries, "answers")


def answers_from(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """ScanQA's submission, question id -> ranked answers (``answer_top10``).

    Raises:
        ValueError: an entry lacks a field, or repeats an id.
    """
    return _by_question(entries, "answer_top10")


def _by_question(entries: Iterable[Mapping[str, Any]], field: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        identity = _field(entry, "question_id", number)
        if identity in found:
            raise ValueError(f"Entry {number} repeats question_id {identity!r}.")
        found[identity] = list(_field(entry, field, number))
    return found


def _object(entry: Mapping[str, Any], number: int) -> NamedObject:
    scene, identity, name = (_field(entry, field, number) for field in ("scene_id", "object_id", "object_name"))
    return NamedObject(scene, str(identity), name)


def _box(boxes: Boxes, scene: str, identity: str, number: int) -> tuple[float, ...]:
    try:
        return tuple(boxes[scene][identity])
    except KeyError:
        raise ValueError(f"Entry {number}: object {identity!r} of {scene} has no box.") from None


def _field(entry: Mapping[str, Any], field: str, number: int) -> Any:
    if field not in entry:
        raise ValueError(f"Entry {number} has no field {field!r}.")
    return entry[field]
