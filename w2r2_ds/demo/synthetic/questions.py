"""Questions about a room that its images answer, with the one true answer: the material of ScanQA's format.

Every answer is decided by the boxes and colours with the margins of ``relations.py``, and names only objects that
some frame sees. An unseen object cannot change it either: it loses to the answer like any other candidate, and a class
with an unseen member is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.relations import (
    CENTER_MARGIN,
    GAP_MARGIN,
    SIZE_RATIO,
    anchor_ids,
    anchor_phrase,
    between,
    clear_minimum,
    extreme,
    gap,
    plural,
    relations,
    resolve,
    scopes,
)
from w2r2_ds.demo.synthetic.rooms import RoomObject

NEXT_TO = 0.6
"""Largest distance on the floor plan, metres, at which an object is said to be next to another."""

STRIP = 0.7
"""What reaches this close to a wall, metres, could be meant by "along the wall"."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PARTLY = {"bed", "picture", "plant"}
"""Classes of which only a part (blanket, field, pot) has the object's colour."""

_TEMPLATES = {
    "color of the only": ("What color is the {one}?", "What is the color of the {one}?"),
    "color nearest": ("What color is the {one} nearest to {a}?", "What color is the {one} closest to {a}?"),
    "color farthest": ("What color is the {one} farthest from {a}?",),
    "color between": ("What color is the {one} between {a} and {b}?",),
    "count": ("How many {many} are there?", "How many {many} are in the room?"),
    "nearest": ("What is nearest to {a}?", "What is closest to {a}?"),
    "between": ("What stands between {a} and {b}?", "What is between {a} and {b}?"),
    "larger": ("Which is larger, {a} or {b}?", "Which one is bigger, {a} or {b}?"),
    "side": (
        "Facing {a}, what comes next to its {side} along the wall?",
        "What comes next along the wall to the {side} of {a} when you face it?",
    ),
    "where": ("Where is {a}?", "Where can you find {a}?"),
}


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: ``color``, ``count``, ``nearest``, ``between``, ``larger``, ``side`` or ``where``.
        text: the question.
        answers: one or two lower-case references that mean the same, the shorter first.
        object_ids: what the answer is about: the object asked for, or all that are counted.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    object_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    """A question before its words are chosen: ``template`` and what fills it."""

    template: str
    slots: dict[str, str | None]
    answers: tuple[str, ...]
    object_ids: tuple[int, ...]


def ask(
    rng: np.random.Generator, objects: Sequence[RoomObject], visible: Collection[int], count: int
) -> list[Question]:
    """Ask up to ``count`` different questions, spread over kinds, and over answers within a kind.

    Args:
        rng: the only source of randomness.
        objects: all objects of the room; ``objects[i].object_id == i``.
        visible: ids of the objects that some frame sees.
        count: largest number of questions.
    """
    pools = {kind: _spread(rng, list(find(objects, visible))) for kind, find in _FINDERS.items()}
    kinds = [str(kind) for kind in rng.permutation(list(_FINDERS))]
    chosen: list[Question] = []
    while len(chosen) < count and any(pools.values()):
        for kind in kinds:
            if pools[kind] and len(chosen) < count:
                found = pools[kind].pop()
                text = str(rng.choice(_TEMPLATES[found.template])).format_map(found.slots)
                chosen.append(Question(kind, text, found.answers, found.object_ids))
    return chosen


def _spread(rng: np.random.Generator, found: list[_Found]) -> list[_Found]:
    """Shuffle so that, taken from the end, every answer comes once before any comes twice: none is common by number."""
    seen: Counter[str] = Counter()
    ranked = []
    for i in rng.permutation(len(found)):
        answer = found[i].answers[0]
        ranked.append((seen[answer], float(rng.random()), int(i)))
        seen[answer] += 1
    return [found[i] for _, _, i in sorted(ranked, reverse=True)]


def _colors(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """Colour of the only one of its class, or of the one that stands in a relation."""
    names = Counter(o.name for o in objects)
    for o in objects:
        if names[o.name] == 1 and o.object_id in visible and _has_color(o):
            yield _Found("color of the only", {"one": o.name}, (o.color,), (o.object_id,))
    for name, color in scopes(objects):
        for relation, anchors in relations(objects, visible):
            target = resolve(objects, name, None, relation, anchors) if anchors and color is None else None
            if target is None or target not in visible or not _has_color(objects[target]):
                continue
            phrases = [anchor_phrase(objects, anchor) for anchor in anchors] + [None]
            slots = {"one": name, "a": phrases[0], "b": phrases[1]}
            yield _Found(f"color {relation}", slots, (objects[target].color,), (target,))


def _counts(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """Number of a class, or of one colour of a class that has several; all of the class are visible."""
    for name in dict.fromkeys(o.name for o in objects):
        same = [o for o in objects if o.name == name]
        if any(o.object_id not in visible for o in same):
            continue
        colors = sorted({o.color for o in same})
        groups = {name: same}
        if len(colors) > 1 and _has_color(same[0]):
            groups |= {f"{color} {name}": [o for o in same if o.color == color] for color in colors}
        for what, group in groups.items():
            number = len(group)
            ids = tuple(o.object_id for o in group)
            yield _Found("count", {"many": plural(what)}, (str(number), _NUMBERS[number]), ids)


def _nearest(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """What, of everything in the room, is nearest to an anchor."""
    for anchor in anchor_ids(objects, visible):
        best = extreme([o for o in objects if o.object_id != anchor], objects[anchor])
        if best in visible and best is not None:
            yield _Found("nearest", {"a": anchor_phrase(objects, anchor)}, _called(objects[best]), (best,))


def _between(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """What, of everything in the room, stands between two anchors."""
    anchors = anchor_ids(objects, visible)
    for a, b in ((a, b) for a in anchors for b in anchors if a < b):
        best = between([o for o in objects if o.object_id not in (a, b)], objects[a], objects[b])
        if best in visible and best is not None and _on_floor(objects[best]):
            slots = {"a": anchor_phrase(objects, a), "b": anchor_phrase(objects, b)}
            yield _Found("between", slots, _called(objects[best]), (best,))


def _larger(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """Which of two anchors is larger: in volume along the world's axes and along its own, and no lower nor narrower."""
    anchors = [i for i in anchor_ids(objects, visible) if _on_floor(objects[i])]
    for i, j in ((i, j) for i in anchors for j in anchors if i < j):
        # Large classes come first in a room; half of the pairs are turned, or the first named would be the answer.
        a, b = (objects[i], objects[j]) if (i + j) % 2 == 0 else (objects[j], objects[i])
        large, small = (a, b) if a.box[3:].prod() > b.box[3:].prod() else (b, a)
        clear = all(
            large_size.prod() >= SIZE_RATIO * small_size.prod()
            and large_size[:2].prod() >= small_size[:2].prod()
            and large_size[2] >= small_size[2]
            for large_size, small_size in ((large.box[3:], small.box[3:]), (large.oriented[3:6], small.oriented[3:6]))
        )
        if clear:
            phrases = {o.object_id: anchor_phrase(objects, o.object_id) or "" for o in (a, b)}
            answer = phrases[large.object_id]
            slots: dict[str, str | None] = {"a": phrases[a.object_id], "b": phrases[b.object_id]}
            yield _Found("larger", slots, (answer.removeprefix("the "), answer), (large.object_id,))


def _sides(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """What comes next to the left or right along the wall of an anchor that stands against it or hangs on it."""
    for anchor in anchor_ids(objects, visible):
        if KINDS[objects[anchor].name].place == "free":
            continue
        for side in ("left", "right"):
            best = _neighbour(objects, objects[anchor], side)
            if best is not None and best.object_id in visible:
                slots = {"a": anchor_phrase(objects, anchor), "side": side}
                yield _Found("side", slots, _called(best), (best.object_id,))


def _neighbour(objects: Sequence[RoomObject], anchor: RoomObject, side: str) -> RoomObject | None:
    """The next object along the anchor's wall for one who faces it; ``None`` unless it is clear which one that is."""
    turn = anchor.oriented[6]
    outward = np.rint([-np.sin(turn), np.cos(turn)])  # the back of what stands at a wall points at the wall
    along = np.array([-outward[1], outward[0]]) * (1.0 if side == "left" else -1.0)

    def reach(o: RoomObject, way: np.ndarray) -> tuple[float, float]:
        middle, half = float(o.box[:2] @ way), float(o.box[3:5] @ np.abs(way)) / 2
        return middle - half, middle + half

    wall = reach(anchor, outward)[1]
    start, end = reach(anchor, along)
    beside = [
        o
        for o in objects
        if o is not anchor and wall - reach(o, outward)[1] < STRIP and sum(reach(o, along)) > start + end
    ]
    if not beside:
        return None
    gaps = np.array([max(reach(o, along)[0] - end, 0.0) for o in beside])
    centers = np.array([sum(reach(o, along)) / 2 for o in beside])
    best = clear_minimum(centers, CENTER_MARGIN)
    if best is None or best != clear_minimum(gaps, GAP_MARGIN) or gaps[best] <= 0:
        return None
    same_wall = KINDS[beside[best].name].place != "free" and abs(np.sin(beside[best].oriented[6] - turn)) < 1e-6
    return beside[best] if same_wall else None


def _places(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Found]:
    """Next to what a standing object is: what is nearest of everything, close by, standing too (or the door)."""
    for target in anchor_ids(objects, visible):
        o = objects[target]
        best = extreme([other for other in objects if other is not o], o)
        if best is None or best not in visible or not _on_floor(o) or gap(o, objects[best]) > NEXT_TO:
            continue
        phrase = anchor_phrase(objects, best)
        if phrase and (_on_floor(objects[best]) or objects[best].name == "door"):
            answers = (f"next to {phrase}", f"beside {phrase}")
            yield _Found("where", {"a": anchor_phrase(objects, target)}, answers, (target,))


def _has_color(o: RoomObject) -> bool:
    """Whether one colour word fits the whole object, and can be another in another room."""
    return o.name not in _PARTLY and o.name not in ("window", "door")


def _on_floor(o: RoomObject) -> bool:
    return KINDS[o.name].place != "hang"


def _called(o: RoomObject) -> tuple[str, ...]:
    """Reference answers that name an object."""
    return (o.name, f"{o.color} {o.name}") if _has_color(o) else (o.name,)


_FINDERS: dict[str, Callable[[Sequence[RoomObject], Collection[int]], Iterator[_Found]]] = {
    "color": _colors,
    "count": _counts,
    "nearest": _nearest,
    "between": _between,
    "larger": _larger,
    "side": _sides,
    "where": _places,
}
