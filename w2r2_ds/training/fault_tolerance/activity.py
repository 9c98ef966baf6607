"""What the main thread of a rank is doing: written by it, read by the watchdog's threads, printed when ranks hang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import nn


class Activity:
    """Step, phase, and the module whose forward began last; every change says that the main thread moves.

    Attributes:
        step: optimizer step, from 1; 0 before the first.
        phase: a word or two, as ``forward``; ``set-up`` before the loop.
        module: name of the module, empty before the first.
        moved: when anything changed last, in seconds of `time.monotonic`.
        moves: changes since the step began. Ranks go through the same ones, so who has made the fewest is behind.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.module, self.moved = 0, "set-up", "", time.monotonic()
        self.moves = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """Say what comes next."""
        if step is not None:
            self.step, self.moves = step, 0
        self.phase, self.moved = phase, time.monotonic()
        self.moves += 1

    def follow(self, name: str, root: Any) -> None:
        """Note, from now on, each forward of a module and of what it holds, down to the blocks of its towers.

        A root that is no module has some as attributes, as a geometry encoder.
        """
        if not isinstance(root, nn.Module):
            for key, value in vars(root).items():
                if isinstance(value, nn.Module):
                    self.follow(f"{name}.{key}", value)
            return
        for path, module in blocks(name, root):
            module.register_forward_pre_hook(self._hook(path))

    def _hook(self, path: str) -> Any:
        def began(module: nn.Module, args: Any) -> None:
            self.module, self.moved = path, time.monotonic()
            self.moves += 1

        return began


def blocks(name: str, module: nn.Module, inside: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """A module and its descendants by name, not below the entries of a list, which are a tower's blocks.

    PEFT's wrappers are left out of the names: ``model.vlm.model.language_model.layers.3``.
    """
    yield name.replace(".base_model.model", ""), module
    if not inside:
        for key, child in module.named_children():
            yield from blocks(f"{name}.{key}", child, isinstance(module, nn.ModuleList))
