"""Fixtures shared by all workers of a test run: the first worker creates them, the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def shared_base(base: Path) -> Path:
    """The folder above the workers' base temps, which is this run's alone; without workers `base` itself."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(base: Path, name: str, make: Callable[[], object]) -> None:
    """Call `make` unless a worker of this run has done so; where it failed, the next one tries again."""
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = base / f"{name}.done"
        if not done.exists():
            make()
            done.touch()
