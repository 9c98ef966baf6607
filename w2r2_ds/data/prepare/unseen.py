"""Items whose object is seen by none of their frames: how many, and likely causes if they are many or all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from w2r2_ds.data.tasks.base import TASKS, UNSEEN, PreparedItems, SkippedItem, TaskOptions

HIGH_SHARE = 0.5
"""Share of unseen items above which the summary lists likely causes."""
_POSES = (
    "the poses are world-to-camera and not camera-to-world, in other units than metres, or aligned already",
    "axisAlignment in scans/SCENE/SCENE.txt is of another scan, or the boxes are not in the axis-aligned world",
)
_DEPTH = "the depth images are not in millimetres (values 10 or 1000 times too large or small)"
_INTRINSICS = "depth_intrinsic.txt is of another image size"
_INSTANCES = "the boxes are not those of EmbodiedScan's scans (different alignment or another version)"


@dataclass(frozen=True)
class Unseen:
    """Number of unseen items, and of items whose visibility was determined."""

    count: int = 0
    of: int = 0

    def __add__(self, other: Unseen) -> Unseen:
        return Unseen(self.count + other.count, self.of + other.of)


def count_unseen(items: PreparedItems, options: TaskOptions) -> Unseen:
    """Count the unseen items among the samples and skipped items of a scene; zero of zero if the task has none."""
    task = TASKS.find(options.task)
    if not task.determines_visibility(options):
        return Unseen()
    determined = [item for _, item in items if not isinstance(item, SkippedItem) or item.reason in UNSEEN]
    return Unseen(sum(task.is_unseen(item) for item in determined), len(determined))


def check_unseen(unseen: Unseen, options: TaskOptions, location: str) -> None:
    """Raise ``ValueError`` with likely causes if all items are unseen.

    Args:
        unseen: counts of the whole split.
        options: task options.
        location: the annotation file.
    """
    if unseen.count and unseen.count == unseen.of:
        raise ValueError(
            f"{location}: all {unseen.of} items are seen by no frame. Likely causes: {_causes(options.visibility)}."
        )


def unseen_line(counts: Mapping[str, Any], visibility: str) -> str:
    """Sentence about the unseen items of a manifest's counts; empty if the task does not determine visibility."""
    if "unseen" not in counts:
        return ""
    unseen = Unseen(**counts["unseen"])
    line = f"{unseen.count} of {unseen.of} items are seen by no frame"
    if unseen.count <= HIGH_SHARE * unseen.of:
        return line
    return f"warning: {line}, more than {HIGH_SHARE:.0%}; likely causes: {_causes(visibility)}"


def _causes(visibility: str) -> str:
    others = (_DEPTH, _INTRINSICS) if visibility == "depth" else (_INSTANCES,)
    return "; ".join([*others[:1], *_POSES, *others[1:]])
