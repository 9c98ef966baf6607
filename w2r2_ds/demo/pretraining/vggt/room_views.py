"""Rendered views of synthetic rooms with depth and cameras, for the pretraining of a tiny VGGT."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from w2r2_ds.demo.synthetic.render import Renderer, pinhole
from w2r2_ds.demo.synthetic.rooms import make_room

VIEWS = 24
"""Cameras on the path around a room, 15 degrees apart."""
IMAGE_SIZE = (168, 112)
"""Width and height in pixels: 12 x 8 patches of 14 pixels."""
_SPLITS = {"train": 4, "val": 5}
"""Second number of a room's seed: other rooms than those of written data sets and of the VLM's pretraining."""
_JPEG_QUALITY = 92
"""As the images of a written data set."""
_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


@dataclass(frozen=True)
class ViewBatch:
    """Views of several rooms.

    Attributes:
        images: ``[B, S, 3, H, W]`` float32, RGB in [0, 1].
        depth: ``[B, S, H, W]`` float32, z coordinates in each camera's frame, metres.
        intrinsics: ``[B, S, 3, 3]`` float32, pixels.
        world_to_camera: ``[B, S, 3, 4]`` float32, metres.
    """

    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor


@dataclass(frozen=True)
class Choice:
    """Views of one room: its index, the views in order, and whether the room is mirrored."""

    room: int
    views: tuple[int, ...]
    mirrored: bool = False


class RoomViews:
    """Rooms of one split, rendered at the first use of each and kept in memory (2 MB a room).

    Room ``i`` depends on ``(seed, split, i)`` only.

    Args:
        seed: of all rooms.
        split: ``"train"`` or ``"val"``.
    """

    def __init__(self, seed: int, split: str) -> None:
        self.seed, self.split = seed, _SPLITS[split]
        self._rooms: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def room(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colour ``[24, H, W, 3]`` uint8, depth ``[24, H, W]`` uint16 (mm), ``[24, 4, 4]`` world-to-camera float64."""
        if index not in self._rooms:
            room = make_room(np.random.default_rng([self.seed, self.split, index]), VIEWS)
            renderer = Renderer(room, IMAGE_SIZE, pinhole(IMAGE_SIZE))
            colors, depths, _ = zip(*(renderer.render(camera) for camera in room.cameras), strict=True)
            self._rooms[index] = (
                np.stack([_as_jpeg(color) for color in colors]),
                np.stack(depths),
                np.linalg.inv(room.cameras),
            )
        return self._rooms[index]

    def batch(self, choices: Sequence[Choice]) -> ViewBatch:
        """The chosen views, the same number of each room. A mirrored room is a room too: x becomes -x."""
        images, depths, cameras = [], [], []
        for choice in choices:
            color, depth, world_to_camera = (values[list(choice.views)] for values in self.room(choice.room))
            if choice.mirrored:
                color, depth = color[:, :, ::-1], depth[:, :, ::-1]
                world_to_camera = _MIRROR @ world_to_camera @ _MIRROR
            images.append(color)
            depths.append(depth)
            cameras.append(world_to_camera[:, :3])
        intrinsics = torch.from_numpy(pinhole(IMAGE_SIZE)[:3, :3]).float()
        return ViewBatch(
            images=torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3).float() / 255,
            depth=torch.from_numpy(np.stack(depths).astype(np.float32) / 1000),
            intrinsics=intrinsics.expand(len(choices), len(choices[0].views), 3, 3),
            world_to_camera=torch.from_numpy(np.stack(cameras)).float(),
        )


def _as_jpeg(color: np.ndarray) -> np.ndarray:
    """The image after compression, as it is read from a data set."""
    file = io.BytesIO()
    Image.fromarray(color).save(file, "JPEG", quality=_JPEG_QUALITY)
    return np.asarray(Image.open(file))
