"""Find the prepared data sets of an evaluation and concatenate their samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.prepared_set import MANIFEST, PreparedSet, read_manifest
from w2r2_ds.evaluation.protocols.records import raise_with_first
from w2r2_ds.utils.files.hashing import file_sha256


def find_sets(config: DataConfig, task: str | None = None, data: Path | None = None) -> list[PreparedSet]:
    """The data sets to evaluate: the folder `data`, or those sets of ``data.val`` that are of the task.

    Args:
        config: data configuration; ``root`` and ``val`` are used.
        task: name of the task; may be None if all sets are of one task.
        data: prepared folder, relative to the working directory or to the root; None for the sets of ``data.val``.

    Raises:
        ValueError: there is no data set, the folder is of another task, or `task` is None and ``data.val`` has several
            tasks.
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
        raise ValueError(f"data.val has {available}; choose a task with --task, or a prepared folder with --data.")
    paths = [path for path, name in tasks.items() if name == wanted[0]]
    if not paths:
        raise ValueError(f"data.val has {available}, but no {wanted[0]}; pass a prepared folder with --data.")
    return [PreparedSet(root / path, root) for path in paths]


def all_samples(sets: list[PreparedSet]) -> Mixture:
    """The concatenated samples of the sets.

    Raises:
        ValueError: two samples have the same id. Answers are identified by the id of their sample.
    """
    samples = Mixture(sets, [1.0] * len(sets), [0] * len(sets))
    repeated = [sample_id for sample_id, count in Counter(sample.id for sample in samples).items() if count > 1]
    folders = " and ".join(str(prepared.folder) for prepared in sets)
    raise_with_first(repeated, f"ids appear twice in {folders}", "; evaluate one data set at a time with --data")
    return samples


def describe_sets(sets: list[PreparedSet]) -> list[dict[str, Any]]:
    """``path`` of each set and SHA-256 of its ``manifest``, for the score file."""
    return [{"path": str(prepared.folder), "manifest": file_sha256(prepared.folder / MANIFEST)} for prepared in sets]
