"""Parse annotations and submissions in the JSON of the golden files and their evaluators.

Formats: ``ScanRefer_filtered_*.json`` and ``ScanQA_v1.0_*.json`` (lists of objects). Everything that lacks a field is
an error with the number of its entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from w2r2_ds.data.sources.labels import LabelMap, groups, nyu40_class, scannet_class
from w2r2_ds.evaluation.protocols.scan2cap_rules import Caption, DescribedObject
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription

Boxes = Mapping[str, Mapping[str, Sequence[float]]]
"""Scene -> object id -> ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""


class NamedObject(NamedTuple):
    """The object of a description."""

    scene_id: str
    object_id: str
    object_name: str


def descriptions_from(entries: Sequence[Mapping[str, Any]], boxes: Boxes, labels: LabelMap) -> list[ScoredDescription]:
    """ScanRefer's annotations of a whole split, in order.

    Raises:
        ValueError: an entry lacks a field, or its object has no box.
    """
    objects = [_object(entry, number) for number, entry in enumerate(entries)]
    official, nyu40 = groups(objects, labels, scannet_class), groups(objects, labels, nyu40_class)
    found = []
    for number, (entry, each) in enumerate(zip(entries, objects, strict=True)):
        box, place = _box(boxes, each.scene_id, each.object_id, number), (each.scene_id, each.object_id)
        key = "|".join((*place, str(_field(entry, "ann_id", number))))
        number_of_class = scannet_class(each.object_name, labels)
        found.append(ScoredDescription(key, each.scene_id, box, official[place], nyu40[place], number_of_class))
    return found


def objects_from(entries: Iterable[Mapping[str, Any]], boxes: Boxes) -> list[DescribedObject]:
    """Scan2Cap's objects: ScanRefer's annotations gathered by object, in order of appearance.

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
    """Captions by ``scene|object|name``: ``caption``, and ``box``, ``token``, ``iou`` if there; the later counts.

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
