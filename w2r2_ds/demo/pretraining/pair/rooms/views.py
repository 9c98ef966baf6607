"""Views of rooms: four frames of a room in a world frame, with the visual tokens of the trained tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2r2_ds.demo.pretraining.pair.rooms.frames import WorldFrame, turns_to_camera, world_frame
from w2r2_ds.demo.pretraining.pair.rooms.geometry import ViewGeometry
from w2r2_ds.demo.pretraining.pair.rooms.room_set import BACKGROUND, TOKEN_GRID, RoomSet


class RoomData:
    """Rooms with the outputs of the trained tower, and their geometry features.

    Args:
        rooms: the rooms.
        features: ``[rooms, 2, frames, tokens, hidden]`` float16 of `tower.encode_rooms`.
        geometry: geometry features of the rooms.
    """

    def __init__(self, rooms: RoomSet, features: Tensor, geometry: ViewGeometry) -> None:
        self.rooms, self.features, self.geometry = rooms, features, geometry
        self.token_pixels = rooms.token_pixels()[..., BACKGROUND:]
        self.unique, self.single = rooms.is_unique(), rooms.is_single()


@dataclass(frozen=True)
class View:
    """Four frames of a room.

    Attributes:
        room: index of the room.
        frames: ``[4]`` indices of the frames.
        frame: world frame.
        visual: ``[4, tokens, hidden]`` float32 outputs of the tower.
        geometry: ``[4, rows, columns, channels]`` float32 features of the geometry encoder.
        boxes: ``[objects, 6]`` float64 centre and size of all objects, metres.
        pixels: ``[4, tokens, objects]`` pixels of each object in the visual tokens.
    """

    room: int
    frames: np.ndarray
    frame: WorldFrame
    visual: Tensor
    geometry: Tensor
    boxes: np.ndarray
    pixels: np.ndarray


def make_view(data: RoomData, room: int, frames: np.ndarray, turns: int | None = None, mirrored: bool = False) -> View:
    """A view of a room.

    Args:
        data: rooms.
        room: index of the room.
        frames: ``[4]`` indices of the frames.
        turns: quarter turns of the world frame; None for the frame of the demo, given by the first frame's camera.
        mirrored: mirror images and geometry.
    """
    rooms = data.rooms
    if turns is None:
        turns = turns_to_camera(rooms, room, int(frames[0]), mirrored)
    frame = world_frame(rooms, room, turns, mirrored)
    pixels = data.token_pixels[room, frames]
    if mirrored:
        pixels = pixels.reshape(len(frames), *TOKEN_GRID, -1)[:, :, ::-1].reshape(pixels.shape)
    return View(
        room,
        frames,
        frame,
        data.features[room, int(mirrored)][torch.from_numpy(frames)].float(),
        data.geometry.features(room, frames, frame),
        frame.boxes(rooms.boxes[room]),
        pixels,
    )


def draw_view(data: RoomData, rng: np.random.Generator, demo_frame: bool) -> View:
    """A random view, mirrored half of the time, in a world frame that the geometry tells or in the demo's."""
    room = int(rng.integers(len(data.rooms)))
    choice = data.geometry.draw(rng, room)
    return make_view(data, room, choice.frames, None if demo_frame else choice.turns, choice.mirrored)


def stack_views(views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """``[views, 4, tokens, hidden]`` visual tokens and ``[views, 4, rows, columns, channels]`` geometry features."""
    return torch.stack([view.visual for view in views]), torch.stack([view.geometry for view in views])
