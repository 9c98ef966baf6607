"""Box proposals as a detector such as Mask3D makes them: most nearly right, some bad, absent or false.

Scan2Cap and ScanRefer's refined accuracy are scored on proposals; exact boxes would hide mistakes there.
"""

from __future__ import annotations

import numpy as np

from w2r2_ds.data.synthetic.rooms import HEIGHT, Room

ABSENT, BAD = 0.06, 0.08
"""Shares of the objects that are not proposed at all, and that are proposed with an IoU below 0.5."""

FALSE = (1, 4)
"""Smallest and largest number of proposals per room where nothing is."""


def propose(rng: np.random.Generator, room: Room) -> np.ndarray:
    """Proposals of one room in random order, ``[n, 6]`` float64: centre and size, aligned world, metres.

    A jittered box keeps an IoU of at least 0.5 with its object: its centre moves by at most 8 % of the size and
    each size changes by at most 12 %. A bad one is shifted by 40 to 70 % of its size, which leaves an IoU of at most
    0.6 / 1.4.
    """
    boxes = []
    for o in room.objects:
        fate = rng.random()
        if fate < ABSENT:
            continue
        center, size = o.box[:3].copy(), o.box[3:].copy()
        if fate < ABSENT + BAD:
            axis = int(rng.integers(2))
            center[axis] += rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.7) * size[axis]
        else:
            center += np.clip(rng.normal(0.0, 0.03, 3), -0.08, 0.08) * size
            size *= 1.0 + np.clip(rng.normal(0.0, 0.05, 3), -0.12, 0.12)
        boxes.append(np.concatenate([center, size]))
    boxes += _false(rng, room, int(rng.integers(FALSE[0], FALSE[1] + 1)))
    return np.array(boxes)[rng.permutation(len(boxes))]


def _false(rng: np.random.Generator, room: Room, count: int) -> list[np.ndarray]:
    """Boxes in the room that touch no object."""
    real = np.stack([o.box for o in room.objects])
    found: list[np.ndarray] = []
    while len(found) < count:
        size = rng.uniform(0.2, 0.6, 3)
        space = np.array([*room.size, HEIGHT]) - size
        center = rng.uniform(-0.5, 0.5, 3) * space + (0.0, 0.0, HEIGHT / 2)
        if (np.abs(center - real[:, :3]) * 2 > size + real[:, 3:]).any(axis=1).all():
            found.append(np.concatenate([center, size]))
    return found
