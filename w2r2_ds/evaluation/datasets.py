"""The prepared data sets of an evaluation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.dataset import MANIFEST, PreparedSet, read_manifest
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.evaluation.protocols.records import raise_with_first
from w2r2_ds.utils.hashing import file_sha256


def find_sets(config: DataConfig, task: str | None = None, data: Path | None = None) -> list[PreparedSet]:
    """The data sets of one task: the given folder, or those of ``data.val`` that have the task.

    Args:
        config: ``root`` and ``val`` are used.
        task: None if ``data.val`` has only one task.
        data: a prepared folder, absolute, relative, or relative to the root.

    Raises:
        ValueError: there is no data set, it is of another task, or `task` is None and ``data.val`` has several.
    """
    root = Path(config.root)
    if data is not None:
        folder = data if (data / MANIFEST).is_file() else root / data
        chosen = PreparedSet(folder, root)
        if task not in (None, chosen.task):
            raise ValueError(f"{folder} has samples of {chosen.task}, not {task}; correct --data or --task.")
        return [chosen]
    tasks = {source.path: str(read_manifest(root / source.path)["task"]) for source in config.val}
    available = ", ".join(f"{path} ({name})" for path, name in tasks.items()) or "nothing"
    wanted = sorted(set(tasks.values())) if task is None else [task]
    if len(wanted) != 1:
        raise ValueError(f"data.val has {available}; choose one with --task, or a folder with --data.")
    paths = [path for path, name in tasks.items() if name == wanted[0]]
    if not paths:
        raise ValueError(f"data.val has {available}, but no {wanted[0]}; name a prepared folder with --data.")
    return [PreparedSet(root / path, root) for path in paths]


def all_samples(sets: list[PreparedSet]) -> Mixture:
    """The samples of these sets, one set after the other.

    Raises:
        ValueError: two samples have the same id, which identifies an answer.
    """
    samples = Mixture(sets, [1.0] * len(sets), [0] * len(sets))
    repeated = [name for name, number in Counter(sample.id for sample in samples).items() if number > 1]
    folders = " and ".join(str(each.folder) for each in sets)
    raise_with_first(repeated, f"ids appear twice in {folders}", "; evaluate one data set at a time with --data")
    return samples


def describe_sets(sets: list[PreparedSet]) -> list[dict[str, Any]]:
    """Path and SHA-256 of the manifest of each set, for reports."""
    return [{"path": str(each.folder), "manifest": file_sha256(each.folder / MANIFEST)} for each in sets]
