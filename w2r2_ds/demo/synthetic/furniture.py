"""Coloured meshes of furniture, made of boxes and cylinders.

Every piece is in its own frame: metres, centre near the origin of the floor plan, front towards -y, floor at z = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trimesh

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 40),
    "blue": (45, 85, 200),
    "green": (50, 150, 65),
    "yellow": (235, 200, 50),
    "orange": (235, 125, 35),
    "purple": (130, 65, 170),
    "white": (245, 245, 245),
    "black": (45, 45, 50),
    "brown": (125, 80, 45),
    "pink": (235, 135, 175),
}
"""Colour word -> RGB."""

_STEEL, _DARK, _WOOD, _LINEN, _GLASS = (125, 125, 130), (60, 55, 50), (150, 105, 65), (240, 238, 230), (165, 205, 235)
_LEAF = (60, 130, 60)
_BOOKS = ((170, 50, 50), (50, 80, 150), (60, 130, 80), (205, 170, 60), (235, 230, 220), (110, 70, 130))

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """Coloured mesh: vertices in metres, RGB from 0 to 255."""

    mesh: trimesh.Trimesh
    color: Color


Builder = Callable[[np.random.Generator, Color], list[Part]]


def _box(size: tuple[float, float, float], center: tuple[float, float, float], color: Color) -> Part:
    """Box with sides ``size``."""
    mesh = trimesh.creation.box(extents=size)
    mesh.apply_translation(center)
    return Part(mesh, color)


def _cylinder(radius: float, bottom: float, top: float, color: Color, x: float = 0.0, y: float = 0.0) -> Part:
    """Upright cylinder from height ``bottom`` to height ``top``."""
    mesh = trimesh.creation.cylinder(radius=radius, height=top - bottom, sections=16)
    mesh.apply_translation((x, y, (bottom + top) / 2))
    return Part(mesh, color)


def _legs(width: float, depth: float, height: float, thick: float, color: Color) -> list[Part]:
    """Four square legs at the corners of a rectangle."""
    x, y = (width - thick) / 2, (depth - thick) / 2
    return [_box((thick, thick, height), (i * x, j * y, height / 2), color) for i in (-1, 1) for j in (-1, 1)]


def chair(rng: np.random.Generator, color: Color) -> list[Part]:
    """Seat, back and four legs."""
    w, seat, back = rng.uniform(0.46, 0.56), rng.uniform(0.43, 0.48), rng.uniform(0.45, 0.58)
    return [
        _box((w, w, 0.07), (0, 0, seat), color),
        _box((w, 0.06, back), (0, w / 2 - 0.03, seat + 0.03 + back / 2), color),
        *_legs(w, w, seat - 0.03, 0.05, _DARK),
    ]


def table(rng: np.random.Generator, color: Color) -> list[Part]:
    """A round top on a column or a rectangular top on legs, of various sizes."""
    height = rng.uniform(0.55, 0.75)
    if rng.random() < 0.4:
        r = rng.uniform(0.35, 0.6)
        foot = [_cylinder(0.06, 0.04, height - 0.05, _DARK), _cylinder(r * 0.6, 0, 0.04, _DARK)]
        return [_cylinder(r, height - 0.05, height, color), *foot]
    w, d = rng.uniform(0.7, 1.5), rng.uniform(0.6, 0.9)
    return [_box((w, d, 0.06), (0, 0, height - 0.03), color), *_legs(w - 0.06, d - 0.06, height - 0.06, 0.07, color)]


def sofa(rng: np.random.Generator, color: Color) -> list[Part]:
    """Base, back, two arms, seat cushions in a lighter tone."""
    w, d = rng.uniform(1.4, 2.1), rng.uniform(0.8, 0.95)
    light: Color = (min(color[0] + 30, 255), min(color[1] + 30, 255), min(color[2] + 30, 255))
    n = 2 if w < 1.7 else 3
    inner = w - 0.36
    cushions = [
        _box((inner / n - 0.03, d - 0.28, 0.16), (inner * ((i + 0.5) / n - 0.5), -0.1, 0.4), light) for i in range(n)
    ]
    return [
        _box((w, d, 0.32), (0, 0, 0.16), color),
        _box((w, 0.22, 0.82), (0, d / 2 - 0.11, 0.41), color),
        *[_box((0.18, d, 0.6), (s * (w / 2 - 0.09), 0, 0.3), color) for s in (-1, 1)],
        *cushions,
    ]


def bed(rng: np.random.Generator, color: Color) -> list[Part]:
    """Wooden frame with head board, mattress, coloured blanket, white pillows."""
    w, d = rng.uniform(1.1, 1.8), rng.uniform(1.95, 2.1)
    pillows = [_box((w * 0.36, 0.34, 0.12), (s * w * 0.23, d / 2 - 0.3, 0.57), _LINEN) for s in (-1, 1)]
    return [
        _box((w, d, 0.28), (0, 0, 0.14), _WOOD),
        _box((w, 0.06, 0.95), (0, d / 2 - 0.03, 0.475), _WOOD),
        _box((w - 0.08, d - 0.1, 0.22), (0, -0.01, 0.39), _LINEN),
        _box((w - 0.02, d * 0.66, 0.18), (0, -d * 0.17, 0.44), color),
        *pillows,
    ]


def cabinet(rng: np.random.Generator, color: Color) -> list[Part]:
    """A body with two doors and knobs."""
    w, d, h = rng.uniform(0.7, 1.2), rng.uniform(0.4, 0.5), rng.uniform(0.8, 1.7)
    knobs = [_box((0.03, 0.03, 0.12), (s * 0.07, -d / 2 - 0.015, h * 0.55), _STEEL) for s in (-1, 1)]
    lines = [
        _box((0.02, 0.01, h - 0.14), (0, -d / 2, h / 2 + 0.03), _DARK),
        _box((w - 0.04, 0.01, 0.02), (0, -d / 2, h - 0.06), _DARK),
    ]
    return [
        _box((w, d, h - 0.06), (0, 0, h / 2 + 0.03), color),
        _box((w - 0.06, d - 0.06, 0.06), (0, 0, 0.03), _DARK),
        *lines,
        *knobs,
    ]


def bookshelf(rng: np.random.Generator, color: Color) -> list[Part]:
    """Open shelves with rows of books."""
    w, d, h, n = rng.uniform(0.7, 1.0), 0.32, rng.uniform(1.3, 1.9), 4
    shelves = [_box((w, d, 0.04), (0, 0, 0.04 + i * (h - 0.08) / n), color) for i in range(n + 1)]
    sides = [_box((0.04, d, h), (s * (w / 2 - 0.02), 0, h / 2), color) for s in (-1, 1)]
    books = []
    for level in range(n):
        bottom, x = 0.06 + level * (h - 0.08) / n, -w / 2 + 0.05
        while x < w / 2 - rng.uniform(0.12, 0.35):
            thick, tall = rng.uniform(0.04, 0.07), (h / n - 0.1) * rng.uniform(0.65, 0.95)
            book = _BOOKS[int(rng.integers(len(_BOOKS)))]
            books.append(_box((thick - 0.005, 0.2, tall), (x + thick / 2, -0.02, bottom + tall / 2), book))
            x += thick
    return [_box((w, 0.02, h), (0, d / 2 - 0.01, h / 2), color), *sides, *shelves, *books]


def desk(rng: np.random.Generator, color: Color) -> list[Part]:
    """A top, a block of three drawers on one side, two legs on the other."""
    w, d, h = rng.uniform(1.1, 1.5), rng.uniform(0.6, 0.7), 0.74
    side = 1 if rng.random() < 0.5 else -1
    x = side * (w / 2 - 0.22)
    drawers = [_box((0.34, 0.012, 0.17), (x, -d / 2 + 0.05, 0.14 + 0.22 * i), _LINEN) for i in range(3)]
    return [
        _box((w, d, 0.05), (0, 0, h - 0.025), color),
        _box((0.4, d - 0.1, h - 0.08), (x, 0, (h - 0.05) / 2 + 0.015), color),
        *[
            _box((0.05, 0.05, h - 0.05), (-side * (w / 2 - 0.05), s * (d / 2 - 0.05), (h - 0.05) / 2), _STEEL)
            for s in (-1, 1)
        ],
        *drawers,
    ]


def lamp(rng: np.random.Generator, color: Color) -> list[Part]:
    """A floor lamp: foot, pole, wide shade."""
    h, r = rng.uniform(1.15, 1.5), rng.uniform(0.2, 0.26)
    return [
        _cylinder(0.16, 0, 0.04, _DARK),
        _cylinder(0.025, 0.04, h - 0.2, _STEEL),
        _cylinder(r, h - 0.42, h - 0.16, color),
        _cylinder(r * 0.72, h - 0.16, h, color),
    ]


def nightstand(rng: np.random.Generator, color: Color) -> list[Part]:
    """A small chest with two drawers."""
    w, h = rng.uniform(0.42, 0.52), rng.uniform(0.48, 0.6)
    drawers = [_box((w - 0.08, 0.012, h * 0.36), (0, -0.2, h * (0.27 + 0.44 * i)), _LINEN) for i in range(2)]
    return [_box((w, 0.4, h), (0, 0, h / 2), color), *drawers]


def stool(rng: np.random.Generator, color: Color) -> list[Part]:
    """A round seat on four legs."""
    h, r = rng.uniform(0.45, 0.6), rng.uniform(0.18, 0.23)
    return [_cylinder(r, h - 0.09, h, color), *_legs(r * 1.4, r * 1.4, h - 0.08, 0.04, _STEEL)]


def trash_can(rng: np.random.Generator, color: Color) -> list[Part]:
    """A cylinder with a dark opening."""
    h, r = rng.uniform(0.35, 0.5), rng.uniform(0.15, 0.2)
    return [_cylinder(r, 0, h - 0.02, color), _cylinder(r * 0.85, h - 0.02, h, _DARK)]


def plant(rng: np.random.Generator, color: Color) -> list[Part]:
    """A coloured pot with a ball of leaves."""
    r, pot = rng.uniform(0.22, 0.32), 0.3
    leaves = trimesh.creation.icosphere(subdivisions=1, radius=r)
    leaves.apply_translation((0, 0, pot + 0.2 + r))
    return [_cylinder(0.17, 0, pot, color), _cylinder(0.03, pot, pot + 0.3, _WOOD), Part(leaves, _LEAF)]


def window(rng: np.random.Generator, color: Color) -> list[Part]:
    """White frame with four panes, sill at 0.9 m; hangs on a wall."""
    w, h, low = rng.uniform(1.2, 1.7), 1.1, 0.9
    panes = [
        _box((w / 2 - 0.09, 0.03, h / 2 - 0.09), (i * (w / 4 - 0.01), -0.015, low + h / 2 + j * (h / 4 - 0.01)), _GLASS)
        for i in (-1, 1)
        for j in (-1, 1)
    ]
    return [_box((w, 0.04, h), (0, 0, low + h / 2), color), *panes]


def door(rng: np.random.Generator, color: Color) -> list[Part]:
    """A leaf with two sunk panels and a handle."""
    panels = [_box((0.6, 0.02, 0.75), (0, -0.025, z), (165, 120, 80)) for z in (0.55, 1.5)]
    return [
        _box((0.9, 0.05, 2.05), (0, 0, 1.025), color),
        *panels,
        _box((0.12, 0.06, 0.03), (0.36, -0.05, 1.0), _STEEL),
    ]


def picture(rng: np.random.Generator, color: Color) -> list[Part]:
    """A framed landscape: sky above a coloured field."""
    w, h, z = rng.uniform(0.6, 0.95), rng.uniform(0.45, 0.65), 1.55
    return [
        _box((w, 0.03, h), (0, 0, z), _DARK),
        _box((w - 0.1, 0.02, (h - 0.1) * 0.5), (0, -0.015, z + (h - 0.1) * 0.25), _GLASS),
        _box((w - 0.1, 0.02, (h - 0.1) * 0.5), (0, -0.015, z - (h - 0.1) * 0.25), color),
    ]


@dataclass(frozen=True)
class FurnitureClass:
    """A class of furniture: builder, placement, label and number.

    Attributes:
        build: function (generator, colour) -> parts of a piece of random size.
        place: ``"wall"`` (back against a wall), ``"hang"`` (on a wall) or ``"free"``.
        label: NYU40 id and class, as in ScanNet's label table.
        count: minimum and maximum number in a room.
    """

    build: Builder
    place: str
    label: tuple[int, str]
    count: tuple[int, int]


KINDS: dict[str, FurnitureClass] = {
    "window": FurnitureClass(window, "hang", (9, "window"), (1, 1)),
    "door": FurnitureClass(door, "hang", (8, "door"), (1, 1)),
    "bed": FurnitureClass(bed, "wall", (4, "bed"), (0, 1)),
    "sofa": FurnitureClass(sofa, "wall", (6, "sofa"), (1, 2)),
    "desk": FurnitureClass(desk, "wall", (14, "desk"), (0, 2)),
    "cabinet": FurnitureClass(cabinet, "wall", (3, "cabinet"), (2, 3)),
    "bookshelf": FurnitureClass(bookshelf, "wall", (10, "bookshelf"), (0, 2)),
    "nightstand": FurnitureClass(nightstand, "wall", (32, "night stand"), (0, 2)),
    "picture": FurnitureClass(picture, "hang", (11, "picture"), (0, 2)),
    "table": FurnitureClass(table, "free", (7, "table"), (2, 3)),
    "chair": FurnitureClass(chair, "free", (5, "chair"), (4, 6)),
    "lamp": FurnitureClass(lamp, "wall", (35, "lamp"), (1, 2)),
    "stool": FurnitureClass(stool, "free", (39, "otherfurniture"), (0, 2)),
    "trash can": FurnitureClass(trash_can, "wall", (39, "otherfurniture"), (0, 2)),
    "plant": FurnitureClass(plant, "wall", (40, "otherprop"), (0, 1)),
}
"""Class -> kind, in the order of placement: large objects first, because they need the most free space."""
