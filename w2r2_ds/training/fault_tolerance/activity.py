"""Progress of a rank's main thread: written by the training loop, read by the watchdog's threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import nn


class Activity:
    """Step and phase of the training loop, and the module whose forward began last.

    Attributes:
        step: optimizer step, from 1; 0 before the first step.
        phase: one or two words, such as ``forward``; ``set-up`` before the loop.
        module: name of the module; empty before the first forward.
        changed_at: time of the last change, in seconds of `time.monotonic`.
        changes: number of changes since the step began. All ranks make the same changes in the same order, so the rank
            with the fewest changes is behind.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.module, self.changed_at = 0, "set-up", "", time.monotonic()
        self.changes = 0

    def set_phase(self, phase: str, step: int | None = None) -> None:
        """Record the beginning of a phase, and of a step if `step` is given."""
        if step is not None:
            self.step, self.changes = step, 0
        # No lock: a heartbeat may combine fields from before and after this call. The next heartbeat corrects them.
        self.phase, self.changed_at = phase, time.monotonic()
        self.changes += 1

    def follow(self, name: str, root: Any) -> None:
        """Record, from now on, each forward of a module and its descendants, down to the blocks of its towers.

        Args:
            name: name of the root module, which is the prefix of all names.
            root: a module, or an object with modules as attributes, such as a geometry encoder.
        """
        if not isinstance(root, nn.Module):
            for key, value in vars(root).items():
                if isinstance(value, nn.Module):
                    self.follow(f"{name}.{key}", value)
            return
        for path, module in tracked_modules(name, root):
            module.register_forward_pre_hook(self._hook(path))

    def _hook(self, path: str) -> Any:
        def record_forward(module: nn.Module, args: Any) -> None:
            self.module, self.changed_at = path, time.monotonic()
            self.changes += 1

        return record_forward


def tracked_modules(name: str, module: nn.Module, inside: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a module and its descendants, down to the entries of each ModuleList (a tower's blocks).

    PEFT's wrappers are removed from the names: ``model.vlm.model.language_model.layers.3``.

    Args:
        name: name of the module.
        module: root of the traversal.
        inside: whether the module is an entry of a ModuleList, below which the traversal ends.
    """
    yield name.replace(".base_model.model", ""), module
    if not inside:
        for key, child in module.named_children():
            yield from tracked_modules(f"{name}.{key}", child, isinstance(module, nn.ModuleList))
