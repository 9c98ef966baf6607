"""Referring sentences that are true of exactly one object of a room, and that need both what it is and where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from w2r2_ds.data.synthetic.rooms import RoomObject

CENTER_MARGIN = 0.4
"""Metres by which the nearest (farthest) object must beat the next one, between centres on the floor plan."""

GAP_MARGIN = 0.15
"""The same between the facing sides of the boxes; both measures must agree."""

SIZE_RATIO = 1.3
"""By how much the largest (smallest) object's volume must differ from the next one's."""

_TEMPLATES = {
    "nearest": (
        "the {one} nearest to {a}.",
        "find the {one} that is nearest to {a}.",
        "of all the {many}, it is the one nearest to {a}.",
    ),
    "farthest": (
        "the {one} farthest from {a}.",
        "find the {one} that is farthest from {a}.",
        "of all the {many}, it is the one farthest from {a}.",
    ),
    "between": ("the {one} between {a} and {b}.", "find the {one} that stands between {a} and {b}."),
    "largest": ("the largest {one} in the room.",),
    "smallest": ("the smallest {one} in the room.",),
}
_PER_OBJECT, _PER_SIZE = 3, 2


@dataclass(frozen=True)
class Sentence:
    """A sentence with what it means.

    Attributes:
        object_id: the one object that it names.
        name: class of that object.
        color: colour word in the sentence; ``None`` if it has none.
        relation: ``nearest``, ``farthest``, ``between``, ``largest`` or ``smallest``.
        anchors: objects that the relation refers to; none, one or two.
        text: lower-case sentence.
    """

    object_id: int
    name: str
    color: str | None
    relation: str
    anchors: tuple[int, ...]
    text: str


def describe(
    rng: np.random.Generator, objects: Sequence[RoomObject], visible: Collection[int], count: int
) -> list[Sentence]:
    """Make up to ``count`` different sentences about visible objects, spread over objects and relations.

    Args:
        rng: the only source of randomness.
        objects: all objects of the room; ``objects[i].object_id == i``.
        visible: ids of the objects that some frame sees; only these are named, as targets or as anchors.
        count: largest number of sentences.
    """
    found = [
        (color, name, relation, anchors, target)
        for name, color in _scopes(objects)
        for relation, anchors in _relations(objects, visible)
        if (target := resolve(objects, name, color, relation, anchors)) in visible
        and target is not None
        and _needs_what(objects, relation, anchors, target)
    ]
    uses: Counter[int] = Counter()
    sizes = 0
    chosen: list[Sentence] = []
    for limit in range(1, _PER_OBJECT + 1):  # first one sentence per object, then a second, ...
        for i in rng.permutation(len(found)):
            color, name, relation, anchors, target = found[i]
            size = relation in ("largest", "smallest")
            if len(chosen) >= count or uses[target] >= limit or (size and sizes >= _PER_SIZE):
                continue
            text = _text(rng, objects, name, color, relation, anchors)
            if all(sentence.text != text for sentence in chosen):
                chosen.append(Sentence(target, name, color, relation, anchors, text))
                uses[target] += 1
                sizes += size
    return chosen


def resolve(
    objects: Sequence[RoomObject], name: str, color: str | None, relation: str, anchors: tuple[int, ...]
) -> int | None:
    """Id of the one object of a class (and colour) that clearly stands in a relation; ``None`` if none clearly does.

    There must be at least two candidates, none of them an anchor, or the relation would carry no information.
    """
    candidates = [o for o in objects if o.name == name and color in (None, o.color)]
    if len(candidates) < 2 or any(o.object_id in anchors for o in candidates):
        return None
    if relation == "between":
        return _between(candidates, objects[anchors[0]], objects[anchors[1]])
    if relation in ("largest", "smallest"):
        volumes = np.log([o.box[3:].prod() for o in candidates])
        best = _clear_minimum(-volumes if relation == "largest" else volumes, float(np.log(SIZE_RATIO)))
    else:
        sign = 1.0 if relation == "nearest" else -1.0
        anchor = objects[anchors[0]]
        best = _clear_minimum(sign * np.array([_center_distance(o, anchor) for o in candidates]), CENTER_MARGIN)
        if best != _clear_minimum(sign * np.array([_gap(o, anchor) for o in candidates]), GAP_MARGIN):
            return None
    return None if best is None else candidates[best].object_id


def _clear_minimum(values: np.ndarray, margin: float) -> int | None:
    """Index of the least value if it beats the next by ``margin``."""
    order = np.argsort(values)
    return int(order[0]) if values[order[1]] - values[order[0]] >= margin else None


def _center_distance(one: RoomObject, other: RoomObject) -> float:
    return float(np.linalg.norm(one.box[:2] - other.box[:2]))


def _gap(one: RoomObject, other: RoomObject) -> float:
    """Distance on the floor plan between the sides of two boxes; 0 where they overlap."""
    apart = np.abs(one.box[:2] - other.box[:2]) - (one.box[3:5] + other.box[3:5]) / 2
    return float(np.linalg.norm(np.maximum(apart, 0.0)))


def _between(candidates: list[RoomObject], a: RoomObject, b: RoomObject) -> int | None:
    """The candidate in the middle of the way from ``a`` to ``b``, if no other is anywhere near that way."""
    start, way = a.box[:2], b.box[:2] - a.box[:2]
    length = float(np.linalg.norm(way))
    if length < 1.5:
        return None
    inside, near = [], []
    for o in candidates:
        offset = o.box[:2] - start
        share = float(offset @ way) / length**2
        aside = abs(float(way[0] * offset[1] - way[1] * offset[0])) / length
        if 0.25 <= share <= 0.75 and aside <= 0.15 * length:
            inside.append(o.object_id)
        if -0.1 <= share <= 1.1 and aside <= 0.4 * length:
            near.append(o.object_id)
    return inside[0] if len(inside) == 1 and near == inside else None


def _scopes(objects: Sequence[RoomObject]) -> list[tuple[str, str | None]]:
    """(class, colour or None) of which there are at least two objects; colours only where they leave some out."""
    names = Counter(o.name for o in objects)
    pairs = Counter((o.name, o.color) for o in objects)
    scopes: list[tuple[str, str | None]] = [(name, None) for name, n in names.items() if n > 1]
    return scopes + [(name, color) for (name, color), n in pairs.items() if 1 < n < names[name]]


def _relations(objects: Sequence[RoomObject], visible: Collection[int]) -> list[tuple[str, tuple[int, ...]]]:
    anchors = [o.object_id for o in objects if o.object_id in visible and _anchor_phrase(objects, o.object_id)]
    relations: list[tuple[str, tuple[int, ...]]] = [("largest", ()), ("smallest", ())]
    relations += [(relation, (anchor,)) for anchor in anchors for relation in ("nearest", "farthest")]
    return relations + [("between", pair) for pair in combinations(anchors, 2)]


def _anchor_phrase(objects: Sequence[RoomObject], object_id: int) -> str | None:
    """What calls an object by class, or class and colour, unmistakably; ``None`` if nothing does."""
    o = objects[object_id]
    same = [other for other in objects if other.name == o.name]
    if len(same) == 1:
        return f"the {o.name}"
    if sum(other.color == o.color for other in same) == 1:
        return f"the {o.color} {o.name}"
    return None


def _needs_what(objects: Sequence[RoomObject], relation: str, anchors: tuple[int, ...], target: int) -> bool:
    """Whether the relation alone, without the class, would point at something else."""
    others = [o for o in objects if o.object_id not in anchors]
    if relation in ("nearest", "farthest"):
        sign = 1.0 if relation == "nearest" else -1.0
        return min(others, key=lambda o: sign * _gap(o, objects[anchors[0]])).object_id != target
    return True


def _plural(name: str) -> str:
    return name[:-1] + "ves" if name.endswith("f") and name != "sofa" else name + "s"


def _text(
    rng: np.random.Generator,
    objects: Sequence[RoomObject],
    name: str,
    color: str | None,
    relation: str,
    anchors: tuple[int, ...],
) -> str:
    template = str(rng.choice(_TEMPLATES[relation]))
    prefix = f"{color} " if color else ""
    phrases = [_anchor_phrase(objects, anchor) for anchor in anchors] + [None, None]
    return template.format(one=prefix + name, many=prefix + _plural(name), a=phrases[0], b=phrases[1])
