"""Random furnished rooms: one coloured triangle mesh, an exact box per object, and a camera path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import trimesh

from w2r2_ds.demo.synthetic.furniture import KINDS, PALETTE, Part
from w2r2_ds.demo.synthetic.position_prior import PositionPrior

HEIGHT = 2.6
"""Height of every room in metres."""

SHELL_ID, FLOOR_ID = -1, -2
"""Object ids of walls and ceiling, and of the floor."""
PLACEMENT_ATTEMPTS = 40
"""Random poses per object; an object that fits with none of them is dropped."""

_WALL, _FLOOR, _CEILING = (222, 212, 192), (172, 142, 108), (238, 236, 230)
_GAP, _PASSAGE, _HEADROOM = 0.08, 0.35, 0.25
"""Minimum distances in metres: between objects, and of an object from the cameras, horizontally and vertically."""
_LOW_HEADROOM = 0.1
"""The vertical distance for lowered cameras."""
_FIXED_COLORS = {"window": "white", "door": "brown"}


@dataclass(frozen=True)
class RoomObject:
    """A piece of furniture, in the aligned world, metres and radians.

    Attributes:
        object_id: index in ``Room.objects``.
        name: class, a key of ``furniture.KINDS``.
        color: colour word, a key of ``furniture.PALETTE``.
        box: ``[6]`` float64 centre and size of the axis-aligned bounding box.
        oriented: ``[9]`` float64 oriented bounding box (convention of ``boxes3d/transforms.py``): centre; width, depth
            and height; yaw about z, in (-pi, pi], 0 if the front faces -y; two zeros.
    """

    object_id: int
    name: str
    color: str
    box: np.ndarray
    oriented: np.ndarray


@dataclass(frozen=True)
class Room:
    """A room in an axis-aligned world, floor at z = 0.

    Attributes:
        size: width along x and depth along y, metres.
        objects: furniture; ``objects[i].object_id == i``.
        vertices: ``[V, 3]`` float64, metres.
        faces: ``[F, 3]`` int64.
        face_colors: ``[F, 3]`` float64 RGB, 0 to 255.
        face_objects: ``[F]`` int64 object id, or `SHELL_ID` or `FLOOR_ID`.
        cameras: ``[frames, 4, 4]`` float64, OpenCV camera to aligned world.
        height: metres.
        center: x and y of the middle of the floor, metres.
    """

    size: tuple[float, float]
    objects: tuple[RoomObject, ...]
    vertices: np.ndarray
    faces: np.ndarray
    face_colors: np.ndarray
    face_objects: np.ndarray
    cameras: np.ndarray
    height: float = HEIGHT
    center: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Layout:
    """How a room is furnished.

    Attributes:
        objects: factor on the number of objects of every class; at least one stays of a class that the room has.
        camera_drop: furniture is placed so that the cameras can be lowered by this distance, metres.
        prior: correlation of colour or class with place; None for random places.
    """

    objects: float = 1.0
    camera_drop: float = 0.0
    prior: PositionPrior | None = None


@dataclass
class _Builder:
    """A room to which objects are added one by one.

    Attributes:
        rng: the only source of randomness.
        size: width and depth, metres.
        cameras: ``[frames, 4, 4]`` float64; no object may block the camera path.
        layout: how the room is furnished.
        objects: objects added so far.
        parts: their coloured meshes in the aligned world, with object ids.
    """

    rng: np.random.Generator
    size: tuple[float, float]
    cameras: np.ndarray
    layout: Layout
    objects: list[RoomObject] = field(default_factory=list)
    parts: list[tuple[int, Part]] = field(default_factory=list)

    def add(self, name: str, color: str) -> bool:
        """Place one object at a random free position; returns False if `PLACEMENT_ATTEMPTS` draws found none."""
        kind, prior = KINDS[name], self.layout.prior
        parts = kind.build(self.rng, PALETTE[color])
        local_bounds = _bounds(parts, np.eye(4))
        side = 0 if prior is None else prior.draw(self.rng, name, color)
        for _ in range(PLACEMENT_ATTEMPTS * (1 + abs(side))):  # half of the draws are on the other side
            pose = self._wall_pose(parts) if kind.place in ("wall", "hang") else self._free_pose(name)
            bounds = _bounds(parts, pose)
            if side * (bounds[0][0] + bounds[1][0]) >= 0 and self._fits(bounds):
                low, high = bounds
                object_id, box = len(self.objects), np.concatenate([(low + high) / 2, high - low])
                self.objects.append(RoomObject(object_id, name, color, box, _oriented(local_bounds, pose)))
                self.parts += [(object_id, _transformed(part, pose)) for part in parts]
                return True
        return False

    def _wall_pose(self, parts: list[Part]) -> np.ndarray:
        """Random pose with the back (+y side) against a random wall."""
        # Place the object at the wall towards +y, then rotate it about the room's centre by a multiple of 90 degrees.
        # For odd multiples, the length of that wall is the room's depth.
        quarter = int(self.rng.integers(4))
        along, across = (self.size[0], self.size[1]) if quarter % 2 == 0 else (self.size[1], self.size[0])
        low, high = _bounds(parts, np.eye(4))
        reach = along / 2 - (high[0] - low[0]) / 2 - 0.05
        local = np.eye(4)
        local[:3, 3] = (self.rng.uniform(-reach, reach), across / 2 - high[1] - 0.005, 0.0)
        return _turn(quarter * np.pi / 2) @ local

    def _free_pose(self, name: str) -> np.ndarray:
        """Random pose in the room, turned by any quarter of a circle and, except for tables, up to 0.5 radians more."""
        margin = 0.4
        pose = _turn(self.rng.integers(4) * np.pi / 2 + (self.rng.uniform(-0.5, 0.5) if name != "table" else 0.0))
        pose[0, 3] = self.rng.uniform(-1, 1) * (self.size[0] / 2 - margin)
        pose[1, 3] = self.rng.uniform(-1, 1) * (self.size[1] / 2 - margin)
        return pose

    def _fits(self, bounds: tuple[np.ndarray, np.ndarray]) -> bool:
        """Whether axis-aligned bounds are inside the room, apart from other objects, and not on the camera path."""
        headroom = max(_HEADROOM, self.layout.camera_drop + _LOW_HEADROOM)
        return is_free(bounds, self.objects, self.size, self.cameras, headroom)


def is_free(
    bounds: tuple[np.ndarray, np.ndarray],
    others: Iterable[RoomObject],
    size: tuple[float, float],
    cameras: np.ndarray,
    headroom: float = _HEADROOM,
) -> bool:
    """Whether an object fits.

    Args:
        bounds: lowest and highest corner ``[3]`` of the object, metres.
        others: the other objects; the object must be apart from them.
        size: width and depth of the room; the object must be inside.
        cameras: ``[frames, 4, 4]``; the object must not be on their path.
        headroom: vertical distance of the object from cameras above it, metres.
    """
    low, high = bounds
    half = np.array(size) / 2
    if (low[:2] < -half).any() or (high[:2] > half).any():
        return False
    for other in others:
        if (np.abs((low + high) / 2 - other.box[:3]) < (high - low + other.box[3:]) / 2 + _GAP).all():
            return False
    positions = cameras[:, :3, 3]
    near = ((positions[:, :2] > low[:2] - _PASSAGE) & (positions[:, :2] < high[:2] + _PASSAGE)).all(axis=1)
    return not (near & (positions[:, 2] < high[2] + headroom)).any()


def make_room(rng: np.random.Generator, frames: int, layout: Layout = Layout()) -> Room:
    """Make a random room with furniture and a camera path.

    Args:
        rng: the only source of randomness.
        frames: number of cameras.
        layout: how the room is furnished.
    """
    size = (float(rng.uniform(5.0, 6.8)), float(rng.uniform(4.8, 6.2)))
    builder = _Builder(rng, size, camera_path(rng, size, frames), layout)
    for name, kind in KINDS.items():
        count = int(rng.integers(kind.count[0], kind.count[1] + 1))
        if name not in _FIXED_COLORS:  # one door and one window
            count = max(min(count, 1), round(count * layout.objects))
        for color in _colors(rng, name, count):
            builder.add(name, color)
    return _assemble(builder, _shell(size))


def camera_path(rng: np.random.Generator, size: tuple[float, float], frames: int) -> np.ndarray:
    """Path once around the room; cameras point across the room and down, as in a handheld scan.

    Returns:
        ``[frames, 4, 4]`` float64 OpenCV camera-to-world matrices, all different.
    """
    # An ellipse at a small distance from the walls; the height varies a little.
    start, direction = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    angles = start + direction * np.arange(frames) / frames * 2 * np.pi
    radius = np.array(size) / 2 - rng.uniform(0.75, 0.95)
    height = rng.uniform(1.5, 1.65) + 0.05 * np.sin(3 * angles)
    positions = np.stack([radius[0] * np.cos(angles), radius[1] * np.sin(angles), height], axis=1)
    # Viewing directions: yaw towards the opposite side, pitch 20 to 26 degrees down, both with a varying part.
    turn = angles + np.pi + rng.uniform(-0.3, 0.3) + 0.2 * np.sin(2 * angles)
    pitch = np.radians(rng.uniform(20, 26)) + 0.06 * np.cos(2 * angles)
    forward = np.stack([np.cos(turn) * np.cos(pitch), np.sin(turn) * np.cos(pitch), -np.sin(pitch)], axis=1)
    right = np.stack([np.sin(turn), -np.cos(turn), np.zeros(frames)], axis=1)
    # Columns of the rotation are the camera's axes in the world: OpenCV's x right, y down, z forward.
    cameras = np.tile(np.eye(4), (frames, 1, 1))
    cameras[:, :3, 0], cameras[:, :3, 1], cameras[:, :3, 2] = right, np.cross(forward, right), forward
    cameras[:, :3, 3] = positions
    return cameras


def _colors(rng: np.random.Generator, name: str, count: int) -> list[str]:
    """Colours of the ``count`` objects of a class.

    At most two different ones, so that a colour alone often does not identify an object.
    """
    if name in _FIXED_COLORS:
        return [_FIXED_COLORS[name]] * count
    first, second = (str(color) for color in rng.choice(sorted(PALETTE), size=2, replace=False))
    if count == 2:
        return [first, first if rng.random() < 0.6 else second]
    return [first if i % 2 == 0 else second for i in range(count)]


def _turn(angle: float) -> np.ndarray:
    """``[4, 4]`` rotation about z by ``angle`` radians."""
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return pose


def _transformed(part: Part, pose: np.ndarray) -> Part:
    """Copy of a part, moved by ``pose``."""
    mesh = part.mesh.copy()
    mesh.apply_transform(pose)
    return Part(mesh, part.color)


def _bounds(parts: list[Part], pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner ``[3]`` of the parts moved by ``pose``."""
    points = np.concatenate([part.mesh.vertices for part in parts]) @ pose[:3, :3].T + pose[:3, 3]
    return points.min(axis=0), points.max(axis=0)


def _oriented(local_bounds: tuple[np.ndarray, np.ndarray], pose: np.ndarray) -> np.ndarray:
    """Oriented box ``[9]`` of an object with ``local_bounds`` in its own frame, placed by ``pose``."""
    low, high = local_bounds
    center = pose[:3, :3] @ ((low + high) / 2) + pose[:3, 3]
    return np.concatenate([center, high - low, [np.arctan2(pose[1, 0], pose[0, 0]), 0.0, 0.0]])


def _shell(size: tuple[float, float]) -> list[tuple[int, Part]]:
    """Walls, ceiling and floor as slabs around the room, with `SHELL_ID` or `FLOOR_ID`."""
    (w, d), t = size, 0.1
    slabs = [
        (FLOOR_ID, (w + 2 * t, d + 2 * t, t), (0.0, 0.0, -t / 2), _FLOOR),
        (SHELL_ID, (w + 2 * t, d + 2 * t, t), (0.0, 0.0, HEIGHT + t / 2), _CEILING),
    ]
    for sign in (-1, 1):
        slabs.append((SHELL_ID, (t, d, HEIGHT), (sign * (w + t) / 2, 0.0, HEIGHT / 2), _WALL))
        slabs.append((SHELL_ID, (w, t, HEIGHT), (0.0, sign * (d + t) / 2, HEIGHT / 2), _WALL))
    parts = []
    for object_id, extents, center, color in slabs:
        mesh = trimesh.creation.box(extents=extents)
        mesh.apply_translation(center)
        parts.append((object_id, Part(mesh, color)))
    return parts


def _assemble(builder: _Builder, shell: list[tuple[int, Part]]) -> Room:
    """Join all parts into one mesh."""
    vertices, faces, colors, owners, offset = [], [], [], [], 0
    for owner, part in shell + builder.parts:
        vertices.append(np.asarray(part.mesh.vertices))
        faces.append(np.asarray(part.mesh.faces) + offset)  # vertices are numbered over all parts
        colors.append(np.tile(np.array(part.color, dtype=np.float64), (len(part.mesh.faces), 1)))
        owners.append(np.full(len(part.mesh.faces), owner))
        offset += len(part.mesh.vertices)
    return Room(
        builder.size,
        tuple(builder.objects),
        np.concatenate(vertices),
        np.concatenate(faces),
        np.concatenate(colors),
        np.concatenate(owners),
        builder.cameras,
    )
