"""Questions about a room with a unique answer, for annotations in ScanQA's format.

Answers are computed from boxes and colours with the margins of ``relations.py``, and refer only to visible objects.
Invisible objects cannot make an answer wrong: they are candidates like all others, a question whose answer would be
invisible is dropped, and classes with an invisible object are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.options import QUESTION_KINDS
from w2r2_ds.demo.synthetic.relations import (
    CENTER_MARGIN,
    GAP_MARGIN,
    SIZE_RATIO,
    anchor_ids,
    anchor_phrase,
    between,
    clear_minimum,
    extreme,
    plural,
    relations,
    resolve,
    scopes,
    side_distance,
)
from w2r2_ds.demo.synthetic.rooms import RoomObject

NEXT_TO = 0.6
"""Maximum distance on the floor plan for "next to", in metres."""

STRIP = 0.7
"""Maximum distance between an object and the wall for "along the wall", in metres."""

_NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
"""Words for the numbers of objects; twelve chairs are the most (`Options.objects` is at most 2)."""
_PARTLY = {"bed", "picture", "plant"}
"""Classes of which only a part (blanket, field, pot) has the colour of the object."""

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
class GeneratedQuestion:
    """A question with its answer.

    Attributes:
        kind: one of ``options.QUESTION_KINDS``, or ``unique_color``.
        text: the question.
        answers: one or two equivalent lower-case answers, the shorter first.
        object_ids: the object of the answer, or all that are counted.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    object_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Candidate:
    """A question before its wording is chosen: key of ``_TEMPLATES`` and values of its fields."""

    template: str
    fields: dict[str, str | None]
    answers: tuple[str, ...]
    object_ids: tuple[int, ...]


def make_questions(
    rng: np.random.Generator,
    objects: Sequence[RoomObject],
    visible: Collection[int],
    count: int,
    others: Sequence[Sequence[RoomObject]] = (),
    kinds: Sequence[str] = QUESTION_KINDS,
) -> list[GeneratedQuestion]:
    """Make up to ``count`` different questions, spread over kinds, and over answers within a kind.

    Args:
        rng: the only source of randomness.
        objects: all objects of the room; ``objects[i].object_id == i``.
        visible: ids of the objects that are visible in a frame.
        count: maximum number of questions.
        others: the objects of other versions of the room, in which a question must have the same answer too.
        kinds: kinds of questions.
    """
    pools = {}
    for kind in kinds:
        find = _FINDERS[kind]
        found = list(find(objects, visible))
        for other in others:
            same = list(find(other, visible))
            found = [candidate for candidate in found if candidate in same]
        pools[kind] = _spread(rng, found)
    order = [str(kind) for kind in rng.permutation(list(kinds))]
    # Round robin: one question of every kind, then a second one, until there are enough or all pools are empty.
    chosen: list[GeneratedQuestion] = []
    while len(chosen) < count and any(pools.values()):
        for kind in order:
            if pools[kind] and len(chosen) < count:
                question = pools[kind].pop()
                text = str(rng.choice(_TEMPLATES[question.template])).format_map(question.fields)
                chosen.append(GeneratedQuestion(kind, text, question.answers, question.object_ids))
    return chosen


def _spread(rng: np.random.Generator, found: list[_Candidate]) -> list[_Candidate]:
    """Shuffle so that, popped from the end, every answer occurs once before any occurs twice."""
    occurrences: Counter[str] = Counter()
    ranked = []  # (occurrences of the answer before this one, random tie-breaker, index)
    for i in rng.permutation(len(found)):
        answer = found[i].answers[0]
        ranked.append((occurrences[answer], float(rng.random()), int(i)))
        occurrences[answer] += 1
    return [found[i] for _, _, i in sorted(ranked, reverse=True)]


def _unique_colors(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """Colour of the only object of its class."""
    names = Counter(o.name for o in objects)
    for o in objects:
        if names[o.name] == 1 and o.object_id in visible and _has_color(o):
            yield _Candidate("color of the only", {"one": o.name}, (o.color,), (o.object_id,))


def _colors(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """Colour of the only object of its class, or of the only object of its class with a relation."""
    yield from _unique_colors(objects, visible)
    for name, color in scopes(objects):
        for relation, anchors in relations(objects, visible):
            # Only classes without a colour, which is the answer, and relations with anchors, which have templates.
            target = resolve(objects, name, None, relation, anchors) if anchors and color is None else None
            if target is None or target not in visible or not _has_color(objects[target]):
                continue
            phrases = [anchor_phrase(objects, anchor) for anchor in anchors] + [None]
            fields = {"one": name, "a": phrases[0], "b": phrases[1]}
            yield _Candidate(f"color {relation}", fields, (objects[target].color,), (target,))


def _counts(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """Number of objects of a class or, if it has several colours, of one colour. All of the class are visible."""
    for name in dict.fromkeys(o.name for o in objects):
        same = [o for o in objects if o.name == name]
        if any(o.object_id not in visible for o in same):
            continue
        colors = sorted({o.color for o in same})
        groups = {name: same}
        if len(colors) > 1 and _has_color(same[0]):
            groups |= {f"{color} {name}": [o for o in same if o.color == color] for color in colors}
        for phrase, group in groups.items():
            number = len(group)
            ids = tuple(o.object_id for o in group)
            yield _Candidate("count", {"many": plural(phrase)}, (str(number), _NUMBERS[number]), ids)


def _nearest(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """The object that is nearest to an anchor."""
    for anchor in anchor_ids(objects, visible):
        best = extreme([o for o in objects if o.object_id != anchor], objects[anchor])
        if best in visible and best is not None:
            yield _Candidate("nearest", {"a": anchor_phrase(objects, anchor)}, _answers(objects[best]), (best,))


def _between(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """The object between two anchors."""
    anchors = anchor_ids(objects, visible)
    for a, b in ((a, b) for a in anchors for b in anchors if a < b):
        best = between([o for o in objects if o.object_id not in (a, b)], objects[a], objects[b])
        if best in visible and best is not None and _on_floor(objects[best]):
            fields = {"a": anchor_phrase(objects, a), "b": anchor_phrase(objects, b)}
            yield _Candidate("between", fields, _answers(objects[best]), (best,))


def _larger(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """The larger of two anchors: larger volume of both boxes, and not smaller in height or floor area."""
    anchors = [i for i in anchor_ids(objects, visible) if _on_floor(objects[i])]
    for i, j in ((i, j) for i in anchors for j in anchors if i < j):
        # Large classes come first in a room. Half of the pairs are swapped, so that the answer is not always the first.
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
            fields: dict[str, str | None] = {"a": phrases[a.object_id], "b": phrases[b.object_id]}
            yield _Candidate("larger", fields, (answer.removeprefix("the "), answer), (large.object_id,))


def _sides(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """The next object to the left or right of an anchor along its wall."""
    for anchor in anchor_ids(objects, visible):
        if KINDS[objects[anchor].name].place == "free":
            continue
        for side in ("left", "right"):
            best = _neighbour(objects, objects[anchor], side)
            if best is not None and best.object_id in visible:
                fields = {"a": anchor_phrase(objects, anchor), "side": side}
                yield _Candidate("side", fields, _answers(best), (best.object_id,))


def _neighbour(objects: Sequence[RoomObject], anchor: RoomObject, side: str) -> RoomObject | None:
    """The next object along the anchor's wall, for a viewer who faces it; ``None`` if it is ambiguous."""
    # Unit vectors on the floor plan: from the room to the wall (the back of an object at a wall points to the wall),
    # and along the wall, to the left or right of a viewer who faces the wall.
    turn = anchor.oriented[6]
    outward = np.rint([-np.sin(turn), np.cos(turn)])
    along = np.array([-outward[1], outward[0]]) * (1.0 if side == "left" else -1.0)

    def extent(o: RoomObject, axis: np.ndarray) -> tuple[float, float]:
        """Lower and upper end of an object's box along an axis."""
        middle, half = float(o.box[:2] @ axis), float(o.box[3:5] @ np.abs(axis)) / 2
        return middle - half, middle + half

    wall = extent(anchor, outward)[1]
    start, end = extent(anchor, along)
    # Objects near the wall whose centre is farther along it than the anchor's.
    beside = [
        o
        for o in objects
        if o is not anchor and wall - extent(o, outward)[1] < STRIP and sum(extent(o, along)) > start + end
    ]
    if not beside:
        return None
    gaps = np.array([max(extent(o, along)[0] - end, 0.0) for o in beside])
    centers = np.array([sum(extent(o, along)) / 2 for o in beside])
    best = clear_minimum(centers, CENTER_MARGIN)
    if best is None or best != clear_minimum(gaps, GAP_MARGIN) or gaps[best] <= 0:
        return None
    # Near a corner, the next object may stand at the other wall.
    same_wall = KINDS[beside[best].name].place != "free" and abs(np.sin(beside[best].oriented[6] - turn)) < 1e-6
    return beside[best] if same_wall else None


def _places(objects: Sequence[RoomObject], visible: Collection[int]) -> Iterator[_Candidate]:
    """Place of an anchor: next to the object nearest to it, within `NEXT_TO`, which is on the floor or the door."""
    for target in anchor_ids(objects, visible):
        o = objects[target]
        best = extreme([other for other in objects if other is not o], o)
        if best is None or best not in visible or not _on_floor(o) or side_distance(o, objects[best]) > NEXT_TO:
            continue
        phrase = anchor_phrase(objects, best)
        if phrase and (_on_floor(objects[best]) or objects[best].name == "door"):
            answers = (f"next to {phrase}", f"beside {phrase}")
            yield _Candidate("where", {"a": anchor_phrase(objects, target)}, answers, (target,))


def _has_color(o: RoomObject) -> bool:
    """Whether the whole object has one colour, and its class has different colours in different rooms."""
    return o.name not in _PARTLY and o.name not in ("window", "door")


def _on_floor(o: RoomObject) -> bool:
    """Whether an object stands on the floor, not on a wall."""
    return KINDS[o.name].place != "hang"


def _answers(o: RoomObject) -> tuple[str, ...]:
    """Equivalent answers that refer to an object."""
    return (o.name, f"{o.color} {o.name}") if _has_color(o) else (o.name,)


_FINDERS: dict[str, Callable[[Sequence[RoomObject], Collection[int]], Iterator[_Candidate]]] = {
    "color": _colors,
    "count": _counts,
    "nearest": _nearest,
    "between": _between,
    "larger": _larger,
    "side": _sides,
    "where": _places,
    "unique_color": _unique_colors,
}
"""Kind -> its candidates."""
