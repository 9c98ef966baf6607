"""ScanRefer's boxes of many scenes (``data/scan_boxes.py`` makes those of one)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from w2r2_ds.data.progress import progress
from w2r2_ds.data.scan_boxes import write_boxes
from w2r2_ds.data.workers import listed, run_all


def write_all_boxes(
    root: Path | str, scenes: Sequence[str] = (), workers: int = 1, overwrite: bool = False
) -> tuple[int, int]:
    """Make ``scannet_data/SCENE_aligned_bbox.npy`` of every scene that has none.

    Args:
        root: data root in ScanNet's layout.
        scenes: names; without any, those below ``ROOT/scans``.
        workers: processes.
        overwrite: make them again where they are.

    Returns:
        How many were made and how many were there.

    Raises:
        ValueError: there are no scenes, or some cannot be used; the first ten are named, the others are made.
    """
    root, folder = Path(root), Path(root) / "scans"
    if not scenes:
        scenes = sorted(each.name for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if not scenes:
        raise ValueError(f"{folder} holds no scenes; correct --root, or get ScanNet's scans first (docs/data.md).")
    there = {name for name in scenes if (root / "scannet_data" / f"{name}_aligned_bbox.npy").is_file()}
    todo = [(root, name) for name in scenes if overwrite or name not in there]
    problems: dict[str, str] = {}
    with progress("boxes: scenes", len(todo)) as advance:
        for scene_id, problem in run_all(_write, todo, workers):
            if problem:
                problems[scene_id] = problem
            advance()
    if problems:
        sentences = [problems[name] for name in sorted(problems)]
        raise ValueError(listed(f"{len(problems)} of {len(scenes)} scenes have no boxes yet", sentences))
    return len(todo), len(scenes) - len(todo)


def _write(root: Path, scene_id: str) -> tuple[str, str]:
    """Boxes of one scene; its name, and what is wrong with it."""
    try:
        write_boxes(root, scene_id)
    except ValueError as error:
        return scene_id, str(error)
    return scene_id, ""
