"""Referring expressions by colour and class alone ("the red chair."), for one object each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from w2r2_ds.demo.synthetic.rooms import RoomObject
from w2r2_ds.demo.synthetic.sentences import Sentence

CLASS_ALONE = 0.3
"""Share of the objects without a second one of their class whose phrase has no colour."""


def phrases(rng: np.random.Generator, objects: Sequence[RoomObject], visible: Collection[int]) -> list[Sentence]:
    """One phrase per visible object whose colour and class no other object of the room has, in random order.

    It is "the COLOUR CLASS.", or "the CLASS." for `CLASS_ALONE` of the objects that are the only one of their class.

    Args:
        rng: the only source of randomness.
        objects: all objects of the room; ``objects[i].object_id == i``.
        visible: ids of the objects that are visible in a frame; only these are targets.
    """
    names = Counter(o.name for o in objects)
    looks = Counter((o.name, o.color) for o in objects)
    found = []
    for o in objects:
        if looks[o.name, o.color] == 1 and o.object_id in visible:
            color = None if names[o.name] == 1 and rng.random() < CLASS_ALONE else o.color
            text = f"the {o.name}." if color is None else f"the {color} {o.name}."
            found.append(Sentence(o.object_id, o.name, color, None, (), text))
    return [found[i] for i in rng.permutation(len(found))]
