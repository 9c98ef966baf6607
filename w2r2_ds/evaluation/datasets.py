"""Which prepared data sets an evaluation looks at."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.dataset import MANIFEST, PreparedSet, read_manifest
from w2r2_ds.data.mixture import Mixture


def find_sets(config: DataConfig, task: str | None = None, data: Path | None = None) -> list[PreparedSet]:
    """The data sets of one task: the named one, or those of ``data.val`` that hold the task.

    Args:
        config: says where the root is and what ``data.val`` names.
        task: None for the only task that there is.
        data: a prepared folder, as it is or below the root.

    Raises:
        ValueError: there is none, it is of another task, or several tasks are there and none was chosen.
    """
    root = Path(config.root)
    if data is not None:
        folder = data if (data / MANIFEST).is_file() else root / data
        chosen = PreparedSet(folder, root)
        if task not in (None, chosen.task):
            raise ValueError(f"{folder} holds {chosen.task}, not {task}; correct --data or --task.")
        return [chosen]
    tasks = {source.path: str(read_manifest(root / source.path)["task"]) for source in config.val}
    there = ", ".join(f"{path} ({name})" for path, name in tasks.items()) or "nothing"
    wanted = sorted(set(tasks.values())) if task is None else [task]
    if len(wanted) != 1:
        raise ValueError(f"data.val holds {there}; choose one with --task, or a folder with --data.")
    paths = [path for path, name in tasks.items() if name == wanted[0]]
    if not paths:
        raise ValueError(f"data.val holds {there}, but no {wanted[0]}; name a prepared folder with --data.")
    return [PreparedSet(root / path, root) for path in paths]


def all_samples(sets: list[PreparedSet]) -> Mixture:
    """The samples of these sets, one set after the other.

    Raises:
        ValueError: two have the same id, so their answers could not be told apart.
    """
    samples = Mixture(sets, [1.0] * len(sets), [0] * len(sets))
    twice = [name for name, number in Counter(sample.id for sample in samples).items() if number > 1]
    if twice:
        folders = " and ".join(str(each.folder) for each in sets)
        raise ValueError(
            f"{len(twice)} samples of {folders} have the same id, the first is {twice[0]!r}; evaluate one data set at "
            "a time with --data."
        )
    return samples


def describe_sets(sets: list[PreparedSet]) -> list[dict[str, Any]]:
    """Path and SHA-256 of the manifest of each: what an evaluation was made on."""
    return [
        {"path": str(each.folder), "manifest": hashlib.sha256((each.folder / MANIFEST).read_bytes()).hexdigest()}
        for each in sets
    ]
