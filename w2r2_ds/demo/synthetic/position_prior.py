"""Correlation of an object's colour or class with the half of the room where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from w2r2_ds.demo.synthetic.furniture import KINDS, PALETTE

_FIXED = ("window", "door")
"""Classes without a side: their colour is the same in all rooms."""
_COLOR_SIDES = {color: 1 - 2 * (number % 2) for number, color in enumerate(PALETTE)}
_CLASS_SIDES = {name: 1 - 2 * (number % 2) for number, name in enumerate(KINDS)}


@dataclass(frozen=True)
class PositionPrior:
    """Every second colour (or class) stands at x > 0, the others at x < 0.

    Attributes:
        attribute: ``color`` or ``class``.
        strength: probability that an object stands on the side of its attribute, else it stands on the other side.
    """

    attribute: Literal["color", "class"]
    strength: float

    def side(self, name: str, color: str) -> int:
        """Side of a class and colour: 1 for x > 0, -1 for x < 0, 0 for an object without a side."""
        if name in _FIXED:
            return 0
        return _COLOR_SIDES[color] if self.attribute == "color" else _CLASS_SIDES[name]

    def draw(self, rng: np.random.Generator, name: str, color: str) -> int:
        """Side on which to place one object: `side` with probability `strength`, else the opposite one."""
        return self.side(name, color) * (1 if rng.random() < self.strength else -1)
