"""Ground truth of a synthetic room and of phrases about it, computed independently of the tested code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from w2r2_ds.demo.synthetic.furniture import KINDS, PALETTE
from w2r2_ds.demo.synthetic.options import scene_seed
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject, make_room

SCENES = ("scene0000_00", "scene0001_00", "scene5000_00")
"""Scenes of the fixture ``rooms`` (seed 7, 12 frames)."""


def boxes(root: Path, scene: str) -> np.ndarray:
    """``[objects, 8]`` rows of ScanRefer's box file."""
    return np.load(root / "scannet_data" / f"{scene}_aligned_bbox.npy")


def rebuild_room(root: Path, name: str) -> Room:
    """Generate the room of a scene of ``rooms`` again: the first attempt whose boxes are those of the box file."""
    for attempt in range(50):
        split, index = ("val", 0) if name == SCENES[2] else ("train", int(name[5:9]))
        room = make_room(np.random.default_rng([*scene_seed(7, split, index), attempt]), 12)
        stored = boxes(root, name)
        if len(stored) == len(room.objects) and np.allclose(stored[:, :6], [o.box for o in room.objects]):
            return room
    raise AssertionError("no attempt has the boxes of the file")


def matching_objects(objects: Collection[RoomObject], phrase: str) -> list[RoomObject]:
    """Objects that match a phrase such as "red chairs" or "the bed"."""
    words = phrase.removeprefix("the ").split(" ")
    color = words.pop(0) if words[0] in PALETTE else None
    singular = {name: name for name in KINDS} | {name + "s": name for name in KINDS} | {"bookshelves": "bookshelf"}
    name = singular[" ".join(words)]
    return [o for o in objects if o.name == name and color in (None, o.color)]


def matching_object(objects: Collection[RoomObject], phrase: str) -> RoomObject:
    """The only object that matches a phrase."""
    found = matching_objects(objects, phrase)
    assert len(found) == 1, phrase
    return found[0]
