"""Spatial relations between objects (nearest, between, largest), and unambiguous references to objects.

A relation holds only with a margin, so that small errors of a box do not change which object has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np

from w2r2_ds.demo.synthetic.rooms import RoomObject

CENTER_MARGIN = 0.4
"""Minimum difference in metres between the nearest (farthest) object and the next one: centres on the floor plan."""

GAP_MARGIN = 0.15
"""The same for the distance between the sides of the boxes; both measures must agree."""

SIZE_RATIO = 1.3
"""Minimum ratio of the volumes of the largest (smallest) object and the next one."""


def resolve(
    objects: Sequence[RoomObject], name: str, color: str | None, relation: str, anchors: tuple[int, ...]
) -> int | None:
    """Id of the object of a class (and colour) with a relation; ``None`` if it is ambiguous.

    There must be at least two candidates, none of them an anchor; otherwise the relation adds no information.

    Args:
        objects: all objects of the room.
        name: class of the candidates.
        color: colour of the candidates; None for any.
        relation: ``nearest``, ``farthest``, ``between``, ``largest`` or ``smallest``.
        anchors: ids of the objects that the relation refers to: two for ``between``, none for sizes, else one.
    """
    candidates = [o for o in objects if o.name == name and color in (None, o.color)]
    if len(candidates) < 2 or any(o.object_id in anchors for o in candidates):
        return None
    if relation == "between":
        return between(candidates, objects[anchors[0]], objects[anchors[1]])
    if relation in ("largest", "smallest"):
        volumes = np.log([o.box[3:].prod() for o in candidates])  # so that the ratio of volumes is a difference
        best = clear_minimum(-volumes if relation == "largest" else volumes, float(np.log(SIZE_RATIO)))
        return None if best is None else candidates[best].object_id
    return extreme(candidates, objects[anchors[0]], 1.0 if relation == "nearest" else -1.0)


def extreme(candidates: Sequence[RoomObject], anchor: RoomObject, sign: float = 1.0) -> int | None:
    """Id of the candidate nearest to ``anchor`` (``sign`` 1) or farthest from it (-1); ``None`` if ambiguous."""
    best = clear_minimum(sign * np.array([_center_distance(o, anchor) for o in candidates]), CENTER_MARGIN)
    if best is None or best != clear_minimum(
        sign * np.array([side_distance(o, anchor) for o in candidates]), GAP_MARGIN
    ):
        return None
    return candidates[best].object_id


def clear_minimum(values: np.ndarray, margin: float) -> int | None:
    """Index of the minimum, if the second smallest value is larger by ``margin`` or there is none; else ``None``."""
    order = np.argsort(values)
    return int(order[0]) if len(values) == 1 or values[order[1]] - values[order[0]] >= margin else None


def _center_distance(one: RoomObject, other: RoomObject) -> float:
    """Distance of the centres on the floor plan."""
    return float(np.linalg.norm(one.box[:2] - other.box[:2]))


def side_distance(one: RoomObject, other: RoomObject) -> float:
    """Distance on the floor plan between the sides of two boxes; 0 if they overlap."""
    apart = np.abs(one.box[:2] - other.box[:2]) - (one.box[3:5] + other.box[3:5]) / 2
    return float(np.linalg.norm(np.maximum(apart, 0.0)))


def between(candidates: Sequence[RoomObject], a: RoomObject, b: RoomObject) -> int | None:
    """Id of the candidate in the middle between ``a`` and ``b``; ``None`` if another one is near the line too.

    The middle is the half of the line around its midpoint. Candidates in a wider area make the answer ambiguous.
    """
    start, line = a.box[:2], b.box[:2] - a.box[:2]
    length = float(np.linalg.norm(line))
    if length < 1.5:
        return None
    inside, near = [], []
    for o in candidates:
        # Position along the line (0 at a, 1 at b) and distance from it, on the floor plan.
        offset = o.box[:2] - start
        along = float(offset @ line) / length**2
        distance = abs(float(line[0] * offset[1] - line[1] * offset[0])) / length
        if 0.25 <= along <= 0.75 and distance <= 0.15 * length:
            inside.append(o.object_id)
        if -0.1 <= along <= 1.1 and distance <= 0.4 * length:
            near.append(o.object_id)
    return inside[0] if len(inside) == 1 and near == inside else None


def scopes(objects: Sequence[RoomObject]) -> list[tuple[str, str | None]]:
    """Pairs (class, colour or None) of at least two objects; with a colour only if the class has other colours too."""
    names = Counter(o.name for o in objects)
    pairs = Counter((o.name, o.color) for o in objects)
    classes: list[tuple[str, str | None]] = [(name, None) for name, n in names.items() if n > 1]
    return classes + [(name, color) for (name, color), n in pairs.items() if 1 < n < names[name]]


def relations(objects: Sequence[RoomObject], visible: Collection[int]) -> list[tuple[str, tuple[int, ...]]]:
    """All relations with their anchors: none, one or two visible objects with an unambiguous reference."""
    anchors = anchor_ids(objects, visible)
    sizes: list[tuple[str, tuple[int, ...]]] = [("largest", ()), ("smallest", ())]
    places = [(relation, (anchor,)) for anchor in anchors for relation in ("nearest", "farthest")]
    return sizes + places + [("between", pair) for pair in combinations(anchors, 2)]


def anchor_ids(objects: Sequence[RoomObject], visible: Collection[int]) -> list[int]:
    """Ids of the visible objects with an unambiguous reference."""
    return [o.object_id for o in objects if o.object_id in visible and anchor_phrase(objects, o.object_id)]


def anchor_phrase(objects: Sequence[RoomObject], object_id: int) -> str | None:
    """Unambiguous reference to an object by class, or class and colour; ``None`` if there is none."""
    o = objects[object_id]
    same = [other for other in objects if other.name == o.name]
    if len(same) == 1:
        return f"the {o.name}"
    if sum(other.color == o.color for other in same) == 1:
        return f"the {o.color} {o.name}"
    return None


def plural(name: str) -> str:
    """Plural of a class name."""
    return name[:-1] + "ves" if name.endswith("f") and name != "sofa" else name + "s"
