"""FLOPs of matrix products of a module: forward, and with the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass.

    Attributes:
        forward: of the pass itself.
        both: with its backward pass.
    """

    forward: float = 0.0
    both: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.both + other.both)

    def __mul__(self, times: int) -> Work:
        return Work(self.forward * times, self.both * times)


def products(module: nn.Module, rows: int) -> Work:
    """All matrix products of a module that is given so many rows."""
    frozen = trained = 0
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Conv2d | nn.Conv3d):
            weight: Any = each.weight
            size = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty tensor
            frozen, trained = (frozen, trained + size) if weight.requires_grad else (frozen + size, trained)
    return Work(2.0 * rows * (frozen + trained), 2.0 * rows * (2 * frozen + 3 * trained))
