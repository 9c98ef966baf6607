"""Parse annotations and submissions in the JSON of the golden files and their evaluators.

Formats: ``ScanRefer_filtered_*.json`` and ``ScanQA_v1.0_*.json`` (lists of objects). Everything that lacks a field is
an error with the number of its entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from w2r2_ds.evaluation.protocols.scan2cap_rules import Caption, DescribedObject
from w2r2_ds.evaluation.protocols.scanrefer import ScoredDescription

Boxes = Mapping[str, Mapping[str, Sequence[float]]]
"""Scene -> object id -> ``[cx, cy, cz, sx, sy, sz]`` in the axis-aligned world, metres."""


def descriptions_from(entries: Iterable[Mapping[str, Any]], boxes: Boxes) -> list[ScoredDescription]:
    """ScanRefer's annotations, in order.

    Raises:
        ValueError: an entry lacks a field, or its object has no box.
    """
    found = []
    for number, entry in enumerate(entries):
        scene, identity, name = _object(entry, number)
        box = _box(boxes, scene, identity, number)
        found.append(ScoredDescription(scene, identity, name, str(_field(entry, "ann_id", number)), box))
    return found


def objects_from(entries: Iterable[Mapping[str, Any]], boxes: Boxes) -> list[DescribedObject]:
    """Scan2Cap's objects: ScanRefer's annotations gathered by object, in order of appearance.

    Raises:
        ValueError: an entry lacks a field, or its object has no box.
    """
    gathered: dict[tuple[str, str, str], list[tuple[str, tuple[str, ...]]]] = {}
    places: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for number, entry in enumerate(entries):
        key = _object(entry, number)
        places.setdefault(key, _box(boxes, key[0], key[1], number))
        words = tuple(_field(entry, "token", number))
        gathered.setdefault(key, []).append((_field(entry, "description", number), words))
    return [
        DescribedObject(*key, tuple(text for text, _ in texts), tuple(words for _, words in texts), places[key])
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


def _object(entry: Mapping[str, Any], number: int) -> tuple[str, str, str]:
    scene, identity, name = (_field(entry, field, number) for field in ("scene_id", "object_id", "object_name"))
    return scene, str(identity), name


def _box(boxes: Boxes, scene: str, identity: str, number: int) -> tuple[float, ...]:
    try:
        return tuple(boxes[scene][identity])
    except KeyError:
        raise ValueError(f"Entry {number}: object {identity!r} of {scene} has no box.") from None


def _field(entry: Mapping[str, Any], field: str, number: int) -> Any:
    if field not in entry:
        raise ValueError(f"Entry {number} has no field {field!r}.")
    return entry[field]
