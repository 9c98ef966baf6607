"""Referring expressions, each for exactly one object of a room; its class and its position are both needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from w2r2_ds.demo.synthetic.relations import anchor_phrase, plural, relations, resolve, scopes, side_distance
from w2r2_ds.demo.synthetic.rooms import RoomObject

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
"""Maximum number of sentences per object, and of sentences with "largest" or "smallest" per room."""


@dataclass(frozen=True)
class Sentence:
    """A referring expression and its meaning.

    Attributes:
        object_id: the object that it refers to.
        name: class of the object.
        color: colour word in the sentence; ``None`` if it has none.
        relation: ``nearest``, ``farthest``, ``between``, ``largest`` or ``smallest``; ``None`` if colour and class
            alone identify the object.
        anchors: objects that the relation refers to; none, one or two.
        text: lower-case sentence.
    """

    object_id: int
    name: str
    color: str | None
    relation: str | None
    anchors: tuple[int, ...]
    text: str


def make_sentences(
    rng: np.random.Generator,
    objects: Sequence[RoomObject],
    visible: Collection[int],
    count: int,
    others: Sequence[Sequence[RoomObject]] = (),
) -> list[Sentence]:
    """Make up to ``count`` different sentences about visible objects, spread over objects and relations.

    Args:
        rng: the only source of randomness.
        objects: all objects of the room; ``objects[i].object_id == i``.
        visible: ids of the objects that are visible in a frame; only these are targets or anchors.
        count: maximum number of sentences.
        others: the objects of other versions of the room, in which a sentence must refer to the same object too.
    """
    # All combinations of colour, class and relation that identify a visible object.
    found = [
        (color, name, relation, anchors, target)
        for name, color in scopes(objects)
        for relation, anchors in relations(objects, visible)
        if (target := resolve(objects, name, color, relation, anchors)) in visible
        and target is not None
        and _needs_class(objects, relation, anchors, target)
        and all(resolve(other, name, color, relation, anchors) == target for other in others)
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


def _needs_class(objects: Sequence[RoomObject], relation: str, anchors: tuple[int, ...], target: int) -> bool:
    """Whether the relation without the class would refer to another object, so that the class is needed."""
    others = [o for o in objects if o.object_id not in anchors]
    if relation in ("nearest", "farthest"):
        sign = 1.0 if relation == "nearest" else -1.0
        return min(others, key=lambda o: sign * side_distance(o, objects[anchors[0]])).object_id != target
    return True


def _text(
    rng: np.random.Generator,
    objects: Sequence[RoomObject],
    name: str,
    color: str | None,
    relation: str,
    anchors: tuple[int, ...],
) -> str:
    """A random template of the relation, filled in."""
    template = str(rng.choice(_TEMPLATES[relation]))
    prefix = f"{color} " if color else ""
    phrases = [anchor_phrase(objects, anchor) for anchor in anchors] + [None, None]
    return template.format(one=prefix + name, many=prefix + plural(name), a=phrases[0], b=phrases[1])
