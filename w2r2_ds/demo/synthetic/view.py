"""A room with its rendered images, and the objects that they show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from w2r2_ds.data.frames.projection import MIN_VISIBLE_FRACTION, projected_area, visible_fraction
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.demo.synthetic.options import Options, scene_id
from w2r2_ds.demo.synthetic.render import Renderer
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject
from w2r2_ds.demo.synthetic.shift.variants import Variant
from w2r2_ds.demo.synthetic.world_frame import corner_frame

_LARGEST_DEPTH = 65535.0
"""Largest value of a depth image, millimetres."""


@dataclass(frozen=True)
class View:
    """A room, its images, and which objects they show.

    Attributes:
        split: split of the scene.
        name: name of the scene.
        variant: room, in the world frame of the data set, and intrinsics.
        frames: posed frames; the files need not exist.
        colors: ``[height, width, 3]`` uint8 per frame.
        depths: ``[height, width]`` uint16 per frame, millimetres.
        visible_ids: ids of the visible objects of each frame.
    """

    split: str
    name: str
    variant: Variant
    frames: list[Frame]
    colors: list[np.ndarray]
    depths: list[np.ndarray]
    visible_ids: list[list[int]]

    @property
    def room(self) -> Room:
        return self.variant.room

    def frames_of(self, o: RoomObject) -> list[Frame]:
        """The frames that show an object and into whose image its box projects."""
        size, intrinsic = self.image_size, self.variant.intrinsic
        return [
            frame
            for frame, ids in zip(self.frames, self.visible_ids, strict=True)
            if o.object_id in ids and projected_area(o.box, frame.cam_to_world, intrinsic, size) > 0
        ]

    def visible(self) -> set[int]:
        """Ids of the objects that any frame shows."""
        return {o.object_id for o in self.room.objects if self.frames_of(o)}

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        height, width = self.depths[0].shape
        return width, height


def render_view(
    root: Path, options: Options, split: str, index: int, variant: Variant, same: View | None = None
) -> View:
    """Render all frames of a room.

    Args:
        root: folder of the data set.
        options: options of the data set.
        split: split of the scene.
        index: number of the scene in its split.
        variant: room, with its middle at the origin, and intrinsics.
        same: a version of the room with the same pixels, which is not rendered again; depths are scaled.
    """
    if same is None:
        renderer = Renderer(variant.room, options.image_size, variant.intrinsic)
        images = [renderer.render(camera) for camera in variant.room.cameras]
        colors, depths = [image[0] for image in images], [image[1] for image in images]
    else:
        colors = same.colors
        factor = variant.scale / same.variant.scale
        depths = [np.rint(np.minimum(depth * factor, _LARGEST_DEPTH)).astype(np.uint16) for depth in same.depths]
    if options.world_frame == "corner":  # after rendering: the pixels are those of the other frame
        variant = replace(variant, room=corner_frame(variant.room))
    name, room = scene_id(split, index), variant.room
    folder = root / "posed_images" / name
    frames = [
        Frame(i, folder / f"{i:05d}.jpg", folder / f"{i:05d}.png", camera) for i, camera in enumerate(room.cameras)
    ]
    visible_ids = [
        [
            o.object_id
            for o in room.objects
            if visible_fraction(o.box, frame.cam_to_world, variant.intrinsic, depth) >= MIN_VISIBLE_FRACTION
        ]
        for frame, depth in zip(frames, depths, strict=True)
    ]
    return View(split, name, variant, frames, colors, depths, visible_ids)
