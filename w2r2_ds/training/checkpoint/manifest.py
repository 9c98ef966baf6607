"""Which checkpoints of a run are whole: the manifest, how one is found, which are kept. Needs no GPU and no DeepSpeed.

RUN/checkpoints/step-000030/checkpoint.json   the manifest: what the checkpoint is, every file's size and SHA-256, and a
                                              SHA-256 of the manifest itself; written last
RUN/checkpoints/latest                        name of the newest complete checkpoint; moves last
                best                          name of the one with the best validation; moves after `latest`

The digests find a bit that flipped and a file that was cut. They say nothing of who wrote it: whoever can change a
shard can change the manifest, and no file of a checkpoint is ever run (training/checkpoint/deepspeed_io.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.atomic_io import Digest

TENSORS = "trainable.safetensors"
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial"
DAMAGED = ".damaged"
SEAL = "sha256"
STEP = re.compile(r"step-(\d{6,})")


def step_folder(run: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def write_description(folder: Path, description: Mapping[str, Any], files: Mapping[str, Digest]) -> None:
    """Write the manifest of a folder in which every other file is on the disk.

    Args:
        folder: still aside.
        description: JSON values; see `save_checkpoint`.
        files: digest by name below `folder`, with slashes.
    """
    listed = {name: asdict(files[name]) for name in sorted(files)}
    content = {**description, "files": listed}
    atomic_io.replace(folder / DESCRIPTION, json.dumps({**content, SEAL: _seal(content)}, indent=2) + "\n")


def read_description(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its own digest checked.

    Raises:
        ValueError: missing, unreadable, changed or cut.
    """
    file = path / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON; it is cut or damaged.") from None
    if not isinstance(description, dict):
        raise ValueError(f"{file} is no JSON object; it is damaged.")
    if _of_before(description):
        return description
    seal = description.pop(SEAL, None)
    if seal != _seal(description):
        raise ValueError(f"{file} does not have the {SEAL} that it states; it is damaged.")
    return description


def verify(path: Path, deep: bool = True, only: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file; None if it is whole.

    Args:
        path: a step folder.
        deep: read every file and compare digests; else compare sizes only.
        only: names of the files to look at; without it all of them.

    One of an earlier version, whose manifest lists no files, is whole if its tensors and its random states are there.
    """
    try:
        description = read_description(path)
    except ValueError as error:
        return str(error)
    files = description.get("files")
    if files is None:
        wanted = [TENSORS, "config.yaml", *(f"rng-{rank}.pt" for rank in range(description.get("world_size", 0)))]
        missing = [name for name in wanted if (only is None or name in only) and not (path / name).is_file()]
        return f"{path / missing[0]} is missing." if missing else None
    for name, stated in files.items():
        if only is not None and name not in only:
            continue
        file = path / name
        try:
            size = file.stat().st_size
            if size != stated["bytes"]:
                return f"{file} has {size} bytes, {DESCRIPTION} states {stated['bytes']}; it is cut or damaged."
            if deep and (found := atomic_io.digest(file).sha256) != stated["sha256"]:
                wanted = stated["sha256"]
                return f"{file} has SHA-256 {found[:12]}..., {DESCRIPTION} states {wanted[:12]}...; it is damaged."
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}."
    return None


def steps(run: str | Path) -> dict[int, Path]:
    """Step folders of a run, whole or not, by step, the highest first."""
    found = {}
    for path in (Path(run) / "checkpoints").glob("step-*"):
        match = STEP.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def newest_complete(run: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint with the highest step that is whole, every file read; and what is wrong with each above it."""
    damaged: dict[Path, str] = {}
    for path in steps(run).values():
        wrong = verify(path)
        if wrong is None:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def set_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint so that its step can be saved again; it is never deleted. Returns where it lies."""
    target, number = damaged.with_name(damaged.name + DAMAGED), 1
    while target.exists():
        number += 1
        target = damaged.with_name(f"{damaged.name}{DAMAGED}-{number}")
    atomic_io.move(damaged, target)
    return target


def point(file: Path, checkpoint: Path) -> None:
    """Let `latest` or `best` name another checkpoint, at once."""
    atomic_io.replace(file, checkpoint.name + "\n")


def pointed(file: Path) -> Path:
    """The checkpoint that `latest` or `best` names, which need not be there.

    Raises:
        ValueError: it names no step folder.
    """
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    if not STEP.fullmatch(name):
        raise ValueError(f"{file} names {name[:80]!r}, which is no step folder; write the name of one into it.")
    return file.parent / name


def best_of(folder: Path) -> Path | None:
    """The checkpoint that `best` in RUN/checkpoints names; None where it names none, which is not worth a run."""
    try:
        return pointed(folder / BEST) if (folder / BEST).is_file() else None
    except ValueError as error:
        print(f"warning: {error}", flush=True)
        return None


def outdated(run: str | Path, keep: int) -> list[Path]:
    """The checkpoints to delete: all but the newest `keep` complete ones and the best, and remains of such ones."""
    best = best_of(Path(run) / "checkpoints")
    found, whole = [], 0
    for path in steps(run).values():
        complete = (path / DESCRIPTION).is_file()
        whole += complete
        if whole > keep if complete else whole:
            found.append(path)
    return [path for path in found if path != best]


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one is never taken for a whole one."""
    (checkpoint / DESCRIPTION).unlink(missing_ok=True)
    atomic_io.sync(checkpoint)
    shutil.rmtree(checkpoint)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder of a run (its latest), of RUN/checkpoints/latest or best, or of a checkpoint itself.

    It may be a copy for evaluation and export, without the shards and random states that only a resume needs. One of an
    earlier version, which has no digests, is found as well.

    Raises:
        ValueError: there is none, or its trained tensors are not (`load_trainable` reads them).
    """
    path = Path(path)
    wanted = path
    if path.name in (LATEST, BEST) and path.is_file():
        wanted = pointed(path)
    elif has_checkpoint(path):
        wanted = _latest(path)
    if not (wanted / DESCRIPTION).is_file():
        raise ValueError(
            f"{wanted} holds no complete checkpoint ({DESCRIPTION} is missing); name a run, a step folder, or "
            "checkpoints/best of a run that validated (train.eval_every)."
        )
    wrong = verify(wanted, deep=False, only={TENSORS})
    if wrong is not None:
        raise ValueError(f"{wrong.removesuffix('.')}; copy the checkpoint again, or name another step folder.")
    return wanted


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has saved anything, whole or not."""
    return bool(steps(run)) or (Path(run) / "checkpoints" / LATEST).is_file()


def _latest(run: Path) -> Path:
    """What `latest` names; if a kill fell before it moved, or it names nothing, the whole one with the highest step."""
    file = run / "checkpoints" / LATEST
    named = pointed(file) if file.is_file() else None
    whole = (path for path in steps(run).values() if verify(path, deep=False, only={TENSORS}) is None)
    if named is not None and named.is_dir():  # else somebody removed it, or a kill fell before it moved
        return named
    return next(whole, named or run)


def _of_before(description: Mapping[str, Any]) -> bool:
    """Whether a version without digests wrote this manifest; one flipped bit cannot rename all three keys."""
    return not {"files", "incarnation", SEAL} & description.keys()


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its seal, in one canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
