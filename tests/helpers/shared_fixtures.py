"""Fixture data shared by all pytest-xdist workers: the first worker creates it, the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def shared_base(base: Path) -> Path:
    """Temporary folder shared by the workers of this test run: the parent of `base`; without workers `base` itself."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(base: Path, name: str, make: Callable[[], object]) -> None:
    """Call `make` unless a worker of this test run has done so successfully."""
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = base / f"{name}.done"
        if not done.exists():
            make()
            done.touch()
