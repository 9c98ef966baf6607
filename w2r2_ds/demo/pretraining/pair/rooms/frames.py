"""World frames of a room: mirrored or not, turned by quarter turns, moved so that its lowest corner is the origin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from w2r2_ds.demo.pretraining.pair.rooms.room_set import GRID, RoomSet
from w2r2_ds.demo.synthetic.world_frame import quarter_turns


@dataclass(frozen=True)
class WorldFrame:
    """Map of a room's coordinates (origin in the middle) to a world frame.

    Attributes:
        mirrored: first mirror x.
        turns: then turn by this number of quarter turns about z, counter-clockwise from above.
        shift: then add ``[3]`` float64, metres.
    """

    mirrored: bool
    turns: int
    shift: np.ndarray

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points ``[..., 3]`` in the frame, in their dtype."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        x = -x if self.mirrored else x
        for _ in range(self.turns % 4):
            x, y = -y, x
        return np.stack([x, y, z], axis=-1) + self.shift.astype(points.dtype)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Axis-aligned boxes ``[..., 6]`` (centre, size) in the frame."""
        sides = boxes[..., [4, 3, 5]] if self.turns % 2 else boxes[..., 3:]
        return np.concatenate([self.points(boxes[..., :3]), sides], axis=-1)

    def point_map(self, points: np.ndarray) -> np.ndarray:
        """Point maps ``[frames, rows, columns, 4, 3]`` in the frame; those of mirrored images if it is mirrored."""
        if self.mirrored:  # the columns of patches, and of the 2 x 2 points of a patch
            cells = points.reshape(len(points), *GRID, 2, 2, 3)
            points = cells[:, :, ::-1, :, ::-1].reshape(points.shape)
        return self.points(points)


def world_frame(rooms: RoomSet, room: int, turns: int, mirrored: bool = False) -> WorldFrame:
    """Frame of a room after quarter turns, with its lowest corner in x and y at 0; the floor stays at z = 0."""
    width, depth = rooms.sizes[room] if turns % 2 == 0 else rooms.sizes[room][::-1]
    return WorldFrame(mirrored, turns, np.array([width / 2, depth / 2, 0.0]))


def turns_to_camera(rooms: RoomSet, room: int, frame: int, mirrored: bool = False) -> int:
    """Quarter turns after which the camera of a frame faces +y, as nearly as quarter turns allow."""
    pose = rooms.cameras[room, frame]
    return quarter_turns(np.diag([-1.0, 1.0, 1.0, 1.0]) @ pose if mirrored else pose)
