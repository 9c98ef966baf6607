"""Names of scenes, options to prepare them, and the content of a prepared folder."""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.tasks.base import TaskOptions

SECOND, THIRD = "scene0001_00", "scene0002_00"
DEPTH = TaskOptions("scanrefer", "train", frames=FrameOptions("uniform", 2), visibility="depth")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
