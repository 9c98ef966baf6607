"""Rooms of the pretraining, rendered in memory: images, points, pixels of every object, boxes and questions."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.point_maps import camera_points, patch_positions
from w2r2_ds.data.frames.projection import MIN_VISIBLE_FRACTION, projected_area, visible_fraction
from w2r2_ds.data.sources.depth_frames import DepthFrame
from w2r2_ds.demo.pretraining.pair.settings import IMAGE_SIZE, ROOM_FRAMES
from w2r2_ds.demo.synthetic.furniture import KINDS, PALETTE
from w2r2_ds.demo.synthetic.questions import make_questions
from w2r2_ds.demo.synthetic.render import Renderer, pinhole
from w2r2_ds.demo.synthetic.rooms import FLOOR_ID, SHELL_ID, Room, RoomObject, make_room
from w2r2_ds.models.geometry.point_map import CHANNELS, PATCH_SIZE, POINTS_PER_SIDE
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec

CLASSES, COLORS = tuple(KINDS), tuple(PALETTE)
MAX_OBJECTS = sum(kind.count[1] for kind in KINDS.values())
BACKGROUND = 2
"""Owners of pixels before the objects: walls and ceiling, floor."""
GRID = (IMAGE_SIZE[1] // PATCH_SIZE, IMAGE_SIZE[0] // PATCH_SIZE)
"""Rows and columns of patches."""
TOKEN_GRID = (GRID[0] // 2, GRID[1] // 2)
"""Rows and columns of visual tokens, of 2 x 2 patches."""
TOKENS = TOKEN_GRID[0] * TOKEN_GRID[1]
GEOMETRY = GeometrySpec(PATCH_SIZE, POINTS_PER_SIDE**2 * CHANNELS, PointMapSpec(POINTS_PER_SIDE, "world"))
_SPLITS = {"train": 2, "val": 3}
"""Second number of a room's seed. It is 0 or 1 in `options.scene_seed`, so no room of a written data set is among
these, with any seed."""
_QUESTIONS = 1000
"""Maximum number of questions of a room before some are dropped: all."""
_JPEG_QUALITY = 92
"""As the images of a written data set."""


@dataclass
class RoomQuestion:
    """A question about a colour or a number.

    Attributes:
        text: the question.
        answer: the answer.
        target: the object of a question about a colour; -1 for a number.
    """

    text: str
    answer: str
    target: int


@dataclass
class RoomSet:
    """Arrays of rooms; those of objects are padded to `MAX_OBJECTS`. Coordinates have the origin in a room's middle.

    Attributes:
        images: ``[rooms, frames, height, width, 3]`` uint8.
        points: ``[rooms, frames, rows, columns, 4, 3]`` float32, the world points of every patch, metres.
        pixels: ``[rooms, frames, rows, columns, 2 + objects]`` uint8: pixels of a patch that show walls or ceiling, the
            floor, and each object.
        visible: ``[rooms, frames, objects]`` bool, by the rule of data preparation.
        boxes: ``[rooms, objects, 6]`` float64 centre and size, metres.
        classes: ``[rooms, objects]`` int64 index in `CLASSES`, -1 for padding.
        colors: ``[rooms, objects]`` int64 index in `COLORS`, -1 for padding.
        cameras: ``[rooms, frames, 4, 4]`` float64, OpenCV camera to world.
        sizes: ``[rooms, 2]`` float64 extent in x and y, metres.
        questions: per room, questions about colours of the only object of a class, and about numbers.
    """

    images: np.ndarray
    points: np.ndarray
    pixels: np.ndarray
    visible: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    colors: np.ndarray
    cameras: np.ndarray
    sizes: np.ndarray
    questions: list[list[RoomQuestion]]

    def __len__(self) -> int:
        return len(self.sizes)

    def is_unique(self) -> np.ndarray:
        """``[rooms, objects]`` bool: the only object of its class and colour."""
        return _occurrences(self.classes * len(COLORS) + self.colors) & (self.classes >= 0)

    def is_single(self) -> np.ndarray:
        """``[rooms, objects]`` bool: the only object of its class."""
        return _occurrences(self.classes) & (self.classes >= 0)

    def token_pixels(self) -> np.ndarray:
        """``[rooms, frames, tokens, 2 + objects]`` int64: `pixels` summed over the patches of a visual token."""
        rooms, frames = self.pixels.shape[:2]
        cells = self.pixels.reshape(rooms, frames, TOKEN_GRID[0], 2, TOKEN_GRID[1], 2, -1)
        return cells.sum(axis=(3, 5), dtype=np.int64).reshape(rooms, frames, TOKENS, -1)


def _occurrences(keys: np.ndarray) -> np.ndarray:
    """``[rooms, n]`` -> whether a key occurs once in its room."""
    return (keys[:, :, None] == keys[:, None, :]).sum(-1) == 1


def room_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Random generator of a room."""
    return np.random.default_rng([seed, _SPLITS[split], index])


def make_rooms(seed: int, split: str, count: int) -> RoomSet:
    """Make and render the first `count` rooms of a split, ``train`` or ``val``."""
    parts = []
    for index in range(count):
        rng = room_generator(seed, split, index)
        parts.append(render_room(make_room(rng, ROOM_FRAMES), rng))
    return stack_rooms(parts)


def stack_rooms(parts: Sequence[RoomSet]) -> RoomSet:
    """Rooms of the results of `render_room`."""
    arrays = {f.name: np.stack([getattr(part, f.name) for part in parts]) for f in fields(RoomSet)[:-1]}
    return RoomSet(**arrays, questions=[part.questions for part in parts])  # type: ignore[misc]


def save_rooms(rooms: RoomSet, file: Path) -> None:
    """Write rooms to an uncompressed npz file."""
    arrays = {f.name: getattr(rooms, f.name) for f in fields(RoomSet)[:-1]}
    questions = json.dumps([[[q.text, q.answer, q.target] for q in each] for each in rooms.questions])
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, questions=np.frombuffer(questions.encode(), dtype=np.uint8), **arrays)
    partial.replace(file)


def load_rooms(file: Path) -> RoomSet:
    """Read the file of `save_rooms`."""
    with np.load(file, allow_pickle=False) as stored:
        questions = json.loads(stored["questions"].tobytes())
        arrays = {f.name: stored[f.name] for f in fields(RoomSet)[:-1]}
    return RoomSet(**arrays, questions=[[RoomQuestion(*values) for values in each] for each in questions])


def render_room(room: Room, rng: np.random.Generator) -> RoomSet:
    """Arrays of one room, without the first dimension; ``questions`` are those of the room.

    Args:
        room: a room with its middle at the origin and `ROOM_FRAMES` cameras.
        rng: for the order and the wording of questions.
    """
    objects, intrinsic = room.objects, pinhole(IMAGE_SIZE)
    renderer = Renderer(room, IMAGE_SIZE, intrinsic)
    images, points, pixels = [], [], []
    visible = np.zeros((ROOM_FRAMES, MAX_OBJECTS), dtype=bool)
    for frame, camera in enumerate(room.cameras):
        color, depth, owner = renderer.render(camera)
        images.append(_through_jpeg(color))
        points.append(_world_points(depth, camera, intrinsic))
        pixels.append(_owners(owner))
        for o in objects:
            clear = visible_fraction(o.box, camera, intrinsic, depth) >= MIN_VISIBLE_FRACTION
            visible[frame, o.object_id] = clear and projected_area(o.box, camera, intrinsic, IMAGE_SIZE) > 0
    boxes = np.zeros((MAX_OBJECTS, 6))
    boxes[: len(objects)] = [o.box for o in objects]
    return RoomSet(
        images=np.stack(images),
        points=np.stack(points),
        pixels=np.stack(pixels),
        visible=visible,
        boxes=boxes,
        classes=_padded([CLASSES.index(o.name) for o in objects]),
        colors=_padded([COLORS.index(o.color) for o in objects]),
        cameras=room.cameras,
        sizes=np.array(room.size),
        questions=_questions(rng, objects, visible),  # type: ignore[arg-type]
    )


def _padded(numbers: Sequence[int]) -> np.ndarray:
    return np.array([*numbers, *[-1] * (MAX_OBJECTS - len(numbers))], dtype=np.int64)


def _through_jpeg(color: np.ndarray) -> np.ndarray:
    """The image after a round trip through the file format of a written data set."""
    file = io.BytesIO()
    Image.fromarray(color).save(file, "jpeg", quality=_JPEG_QUALITY)
    return np.array(Image.open(file))


def _world_points(depth: np.ndarray, camera: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Points of every patch ``[rows, columns, 4, 3]`` float32, as data loading computes them from files."""
    pixels = patch_positions(IMAGE_SIZE, GEOMETRY) - 0.5  # positions count from the corner, pixels from a centre
    frame = DepthFrame(Path(), intrinsic[:3, :3], intrinsic[:3, :3], camera)
    points = camera_points(pixels, IMAGE_SIZE, depth, frame)
    return (points @ camera[:3, :3].T + camera[:3, 3]).astype(np.float32)


def _owners(owner: np.ndarray) -> np.ndarray:
    """Pixels of every patch ``[rows, columns, 2 + objects]`` uint8 by owner; `owner` as `Renderer.render` gives it."""
    index = np.where(owner >= 0, owner + BACKGROUND, np.where(owner == FLOOR_ID, 1, 0))
    assert ((owner >= 0) | (owner == FLOOR_ID) | (owner == SHELL_ID)).all()
    one_hot = np.eye(BACKGROUND + MAX_OBJECTS, dtype=np.uint8)[index]  # [height, width, owners]
    return one_hot.reshape(GRID[0], PATCH_SIZE, GRID[1], PATCH_SIZE, -1).sum(axis=(1, 3), dtype=np.uint8)


def _questions(rng: np.random.Generator, objects: Sequence[RoomObject], visible: np.ndarray) -> list[RoomQuestion]:
    """All questions about the colour of the only object of a class, and about numbers, in random order."""
    seen = set(np.flatnonzero(visible.any(axis=0)).tolist())
    found = make_questions(rng, objects, seen, _QUESTIONS, kinds=("unique_color", "count"))
    return [RoomQuestion(q.text, q.answers[0], -1 if q.kind == "count" else q.object_ids[0]) for q in found]
