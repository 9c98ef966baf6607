"""World frames of a room: origin in its middle, or in its lowest corner with +y along the first camera's heading.

With ``center``, the frames of two rooms have nothing in common but the walls' directions: a quarter turn of the world
cannot be seen in an image, so no model can know x and y of a box without geometry. With ``corner``, a model can learn
from images where a box roughly is, and all coordinates are 0 or more: a grounding answer has no signs and, in rooms
below 10 m, one digit before every decimal point.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from w2r2_ds.demo.synthetic.rooms import Room, RoomObject

_TURNS = np.array([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]], dtype=np.float64)
"""Rotations of the floor plan by 0, 90, 180 and 270 degrees; integers, so that a turned box is exact."""


def corner_frame(room: Room) -> Room:
    """The same room in a world whose origin is the room's lowest corner, with the floor at z = 0.

    The world is turned by the multiple of 90 degrees after which the heading of the first camera is nearest to +y, and
    moved so that the room covers 0 to its width in x and 0 to its depth in y. Scaling a room about its middle scales
    the result about the corner. Render a room before: light and floor pattern depend on its own axes.
    """
    turns = quarter_turns(room.cameras[0])
    size = (room.size[1], room.size[0]) if turns % 2 else room.size
    pose = np.eye(4)
    pose[:2, :2] = _TURNS[turns]
    pose[:2, 3] = np.array(size) / 2 - _TURNS[turns] @ np.array(room.center)
    return replace(
        room,
        size=size,
        center=(size[0] / 2, size[1] / 2),
        objects=tuple(_moved(o, turns, pose) for o in room.objects),
        vertices=room.vertices @ pose[:3, :3].T + pose[:3, 3],
        cameras=pose @ room.cameras,
    )


def quarter_turns(cam_to_world: np.ndarray) -> int:
    """Number of quarter turns about z, 0 to 3, after which a camera's heading is nearest to +y.

    Args:
        cam_to_world: ``[4, 4]`` pose, OpenCV axes.
    """
    # The heading is the camera's z axis on the floor plan; a quarter turn maps (x, y) to (-y, x).
    return int(np.argmax((_TURNS @ cam_to_world[:2, 2])[:, 1]))


def _moved(o: RoomObject, turns: int, pose: np.ndarray) -> RoomObject:
    """An object after a rigid motion ``[4, 4]`` that turns it by a number of quarter turns."""
    box, oriented = o.box.copy(), o.oriented.copy()
    for numbers in (box, oriented):
        numbers[:3] = pose[:3, :3] @ numbers[:3] + pose[:3, 3]
    if turns % 2:
        box[3], box[4] = o.box[4], o.box[3]
    yaw = oriented[6] + turns * np.pi / 2
    oriented[6] = yaw - 2 * np.pi if yaw > np.pi else yaw  # in (-pi, pi], as before
    return replace(o, box=box, oriented=oriented)
