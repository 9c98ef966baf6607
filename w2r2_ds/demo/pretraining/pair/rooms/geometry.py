"""Geometry features of views: codes of exact points in a world frame, or features of the images of a view."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2r2_ds.demo.pretraining.pair.rooms.frames import WorldFrame
from w2r2_ds.demo.pretraining.pair.rooms.room_set import RoomSet
from w2r2_ds.demo.pretraining.pair.settings import ROOM_FRAMES, SAMPLE_FRAMES
from w2r2_ds.models.geometry.encoder import GeometryEncoder

VIEWS = 3
"""Views of a training room whose image features are computed: random frames, every other view mirrored."""


@dataclass(frozen=True)
class Choice:
    """A view to draw.

    Attributes:
        frames: ``[4]`` indices of the frames, ascending.
        turns: quarter turns of the world frame; None for the frame of the demo, given by the first frame's camera.
        mirrored: mirror images and geometry.
    """

    frames: np.ndarray
    turns: int | None
    mirrored: bool


class ViewGeometry(ABC):
    """Features of a geometry encoder for views of rooms.

    Args:
        encoder: the frozen encoder.
        rooms: the rooms.
        seed: seed of the views, where they are chosen beforehand.
    """

    def __init__(self, encoder: GeometryEncoder, rooms: RoomSet, seed: int) -> None:
        self.encoder, self.rooms, self.seed = encoder, rooms, seed

    @abstractmethod
    def draw(self, rng: np.random.Generator, room: int) -> Choice:
        """A random view of a room, for the training."""

    @abstractmethod
    def features(self, room: int, frames: np.ndarray, frame: WorldFrame) -> Tensor:
        """``[4, rows, columns, channels]`` float32 features of the frames of a room, mirrored as the world frame."""


class PointGeometry(ViewGeometry):
    """Codes of the points in the world frame, which differ with every frame: a world may be turned in any way."""

    def draw(self, rng: np.random.Generator, room: int) -> Choice:
        frames = draw_frames(rng)
        return Choice(frames, int(rng.integers(4)), bool(rng.integers(2)))

    def features(self, room: int, frames: np.ndarray, frame: WorldFrame) -> Tensor:
        return self.encoder.encode_frames(torch.from_numpy(frame.point_map(self.rooms.points[room, frames])))


class ImageGeometry(ViewGeometry):
    """Features of the images of a view, as VGGT's. They are slow: those of `VIEWS` views are kept, as float16.

    Images cannot tell a turned world, so every view is in the frame of the demo.
    """

    def __init__(self, encoder: GeometryEncoder, rooms: RoomSet, seed: int) -> None:
        super().__init__(encoder, rooms, seed)
        self._kept: dict[tuple[int, bytes, bool], Tensor] = {}

    def draw(self, rng: np.random.Generator, room: int) -> Choice:
        view = int(rng.integers(VIEWS))
        return Choice(draw_frames(np.random.default_rng([self.seed, 14, room, view])), None, bool(view % 2))

    def features(self, room: int, frames: np.ndarray, frame: WorldFrame) -> Tensor:
        key = (room, frames.astype(np.int64).tobytes(), frame.mirrored)
        if key not in self._kept:
            images = self.rooms.images[room, frames]
            images = images[:, :, ::-1] if frame.mirrored else images
            pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            self._kept[key] = self.encoder.encode_frames(pixels).half()
        return self._kept[key].float()


def draw_frames(rng: np.random.Generator) -> np.ndarray:
    """Random frames of a room, ascending."""
    return np.sort(rng.choice(ROOM_FRAMES, SAMPLE_FRAMES, replace=False))


def view_geometry(encoder: GeometryEncoder, rooms: RoomSet, seed: int) -> ViewGeometry:
    """Features of an encoder of points or of images."""
    kind = PointGeometry if encoder.spec.point_maps else ImageGeometry
    return kind(encoder, rooms, seed)
