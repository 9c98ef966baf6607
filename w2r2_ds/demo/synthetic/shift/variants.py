"""Shifted versions of a validation room: the appearance stays, the geometry changes.

``furniture_scale``  every object is scaled by a factor of its own; it stays at its place on the floor or the wall.
``focal_length``     the cameras have another focal length.
``room_scale``       all lengths are scaled; the pixels stay the same.
``camera``           the cameras are lower and flatter.
``position_prior``   room and cameras are turned by half a circle in the world; the pixels stay the same. Training
                     places objects by colour or class, and after the turn they stand on the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.options import Options
from w2r2_ds.demo.synthetic.position_prior import PositionPrior
from w2r2_ds.demo.synthetic.render import pinhole
from w2r2_ds.demo.synthetic.rooms import HEIGHT, Layout, Room, RoomObject, is_free

SAME_PIXELS = ("room_scale", "position_prior")
"""Shifts whose images are those of the room without the shift."""
OTHER_SIZES = ("furniture_scale", "room_scale")
"""Shifts that change distances and sizes, so that sentences and answers must be checked in the shifted room too: they
have margins in metres, and in a smaller room a clear difference may be too small."""
_ON_FLOOR = 1e-6
"""Height in metres below which the bottom of an object is on the floor."""
_BELOW_CEILING = 0.05
_SCALE_ATTEMPTS = 10
"""Random factors per object; the last one shrinks it, which always fits."""


@dataclass(frozen=True)
class Variant:
    """A room with its camera's intrinsics.

    Attributes:
        room: the room.
        intrinsic: ``[4, 4]`` float64 pinhole matrix of colour and depth images, pixels.
        scale: length of a metre of the room without shift, in metres.
        factors: factor of each object's size relative to the room, by object id.
    """

    room: Room
    intrinsic: np.ndarray
    scale: float
    factors: tuple[float, ...]


def room_layout(options: Options) -> Layout:
    """How the rooms of a data set are furnished, in all splits."""
    shift = options.shift
    prior = PositionPrior(shift.prior, shift.prior_strength) if "position_prior" in shift.names else None
    return Layout(options.objects, shift.camera_drop if "camera" in shift.names else 0.0, prior)


def unshifted(room: Room, options: Options) -> Variant:
    """The room as it was made."""
    return Variant(room, pinhole(options.image_size), 1.0, (1.0,) * len(room.objects))


def shifted(name: str, room: Room, options: Options, rng: np.random.Generator) -> Variant:
    """The room with the shift ``name`` of `options.SHIFTS`; ``rng`` draws the factors of ``furniture_scale``."""
    return _SHIFTS[name](unshifted(room, options), options, rng)


def _furniture_scale(base: Variant, options: Options, rng: np.random.Generator) -> Variant:
    """Scale the objects one by one; an object that cannot grow where it stands shrinks."""
    room = base.room
    objects, vertices, factors = list(room.objects), room.vertices.copy(), []
    for i in rng.permutation(len(objects)):
        others = [o for o in objects if o.object_id != i]
        factor, objects[i] = _fitting_scale(rng, room, objects[i], others, options.shift.furniture_factor)
        factors.append((int(i), factor))
        own = np.unique(room.faces[room.face_objects == i])
        pivot = _pivot(room.objects[i])
        vertices[own] = pivot + factor * (vertices[own] - pivot)
    scaled = replace(room, objects=tuple(objects), vertices=vertices)
    return replace(base, room=scaled, factors=tuple(factor for _, factor in sorted(factors)))


def _fitting_scale(
    rng: np.random.Generator, room: Room, o: RoomObject, others: list[RoomObject], largest: float
) -> tuple[float, RoomObject]:
    """A random factor with which an object still fits, and the scaled object."""
    for attempt in range(_SCALE_ATTEMPTS):
        # Log-uniform in [sqrt(largest), largest], or the inverse: no factor is near 1.
        factor = float(largest ** rng.uniform(0.5, 1.0))
        if rng.random() < 0.5 or attempt == _SCALE_ATTEMPTS - 1:
            factor = 1 / factor
        pivot = _pivot(o)
        box, oriented = o.box.copy(), o.oriented.copy()
        for numbers in (box, oriented):
            numbers[:3] = pivot + factor * (numbers[:3] - pivot)
            numbers[3:6] *= factor
        bounds = (box[:3] - box[3:] / 2, box[:3] + box[3:] / 2)
        if factor < 1 or (bounds[1][2] < HEIGHT - _BELOW_CEILING and is_free(bounds, others, room.size, room.cameras)):
            break
    return factor, replace(o, box=box, oriented=oriented)


def _pivot(o: RoomObject) -> np.ndarray:
    """Point ``[3]`` that stays when an object is scaled: on the floor below it, and at the wall behind it."""
    pivot = o.oriented[:3].copy()
    if o.box[2] - o.box[5] / 2 < _ON_FLOOR:
        pivot[2] = 0.0
    if KINDS[o.name].place != "free":  # the back of the object is at +y of its own axes
        turn, back = o.oriented[6], o.oriented[4] / 2
        pivot[:2] += back * np.array([-np.sin(turn), np.cos(turn)])
    return pivot


def _focal_length(base: Variant, options: Options, rng: np.random.Generator) -> Variant:
    return replace(base, intrinsic=pinhole(options.image_size, options.shift.focal_factor))


def _room_scale(base: Variant, options: Options, rng: np.random.Generator) -> Variant:
    factor, room = options.shift.room_factor, base.room
    lengths = np.array([factor] * 6 + [1.0] * 3)  # angles stay
    cameras = room.cameras.copy()
    cameras[:, :3, 3] *= factor
    scaled = replace(
        room,
        size=(room.size[0] * factor, room.size[1] * factor),
        height=room.height * factor,
        objects=tuple(replace(o, box=o.box * factor, oriented=o.oriented * lengths) for o in room.objects),
        vertices=room.vertices * factor,
        cameras=cameras,
    )
    return replace(base, room=scaled, scale=factor)


def _camera(base: Variant, options: Options, rng: np.random.Generator) -> Variant:
    angle = np.radians(options.shift.camera_flatter)
    # Rotation about the camera's x axis (right) that turns its z axis (forward) towards -y (up).
    up = np.eye(3)
    up[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    cameras = base.room.cameras.copy()
    cameras[:, :3, :3] = cameras[:, :3, :3] @ up
    cameras[:, 2, 3] -= options.shift.camera_drop
    return replace(base, room=replace(base.room, cameras=cameras))


def _position_prior(base: Variant, options: Options, rng: np.random.Generator) -> Variant:
    half_turn = np.diag([-1.0, -1.0, 1.0, 1.0])

    def turned(o: RoomObject) -> RoomObject:
        box, oriented = o.box.copy(), o.oriented.copy()
        box[:2], oriented[:2] = -box[:2], -oriented[:2]
        oriented[6] += np.pi if oriented[6] <= 0 else -np.pi
        return replace(o, box=box, oriented=oriented)

    room = base.room
    return replace(
        base,
        room=replace(
            room,
            objects=tuple(turned(o) for o in room.objects),
            vertices=room.vertices * (-1.0, -1.0, 1.0),
            cameras=half_turn @ room.cameras,
        ),
    )


_SHIFTS: dict[str, Callable[[Variant, Options, np.random.Generator], Variant]] = {
    "furniture_scale": _furniture_scale,
    "focal_length": _focal_length,
    "room_scale": _room_scale,
    "camera": _camera,
    "position_prior": _position_prior,
}
