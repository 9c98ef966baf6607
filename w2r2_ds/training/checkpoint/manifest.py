"""The manifest of a checkpoint: write it, verify files against it, find and prune checkpoints. No GPU, no DeepSpeed.

RUN/checkpoints/step-000030/checkpoint.json   the manifest: description, size and SHA-256 of every file, and a SHA-256
                                              of the manifest itself; written last
RUN/checkpoints/latest                        name of the newest complete checkpoint; written after the checkpoint
                best                          name of the checkpoint with the best validation; written after `latest`

The digests detect bit flips and truncated files, not tampering: a writer of the shards can also change the manifest.
Against that, no file of a checkpoint is ever executed (training/checkpoint/deepspeed_io.py).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.atomic_io import Digest
from w2r2_ds.utils.files.hashing import json_sha256, named_sha256
from w2r2_ds.utils.files.json_io import read_json

TENSORS = "trainable.safetensors"
"""Trained weights as whole tensors."""
MANIFEST = "checkpoint.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial"
"""Suffix of temporary folders and files."""
DAMAGED = ".damaged"
"""Suffix of damaged checkpoints."""
OWN_DIGEST = "sha256"
"""Key of the manifest's own digest."""
STEP = re.compile(r"step-(\d{6,})")

logger = logging.getLogger(__name__)


def step_folder(run: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def write_manifest(folder: Path, description: Mapping[str, Any], files: Mapping[str, Digest]) -> None:
    """Write the manifest; all other files of the folder must be on disk.

    Args:
        folder: the temporary folder of the checkpoint.
        description: JSON values, from `training.checkpoint.save.build_manifest`.
        files: digest by path below `folder`, with slashes.
    """
    # Written last, so a folder without a manifest is incomplete. With its own digest, damage to the manifest is
    # detected without another file.
    content = {**description, "files": {name: asdict(files[name]) for name in sorted(files)}}
    text = json.dumps({**content, OWN_DIGEST: _digest(content)}, indent=2)
    atomic_io.replace(folder / MANIFEST, text + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: it is missing or unreadable, or its content does not have the digest that it states.
    """
    file = path / MANIFEST
    manifest = read_json(file, "a complete checkpoint")
    if not isinstance(manifest, dict) or manifest.pop(OWN_DIGEST, None) != _digest(manifest):
        raise ValueError(f"{file} does not have the {OWN_DIGEST} that it states; it is damaged.")
    return manifest


def verify(path: Path, deep: bool = True, only: Collection[str] | None = None) -> str | None:
    """Check the files of a checkpoint against its manifest.

    Args:
        path: a step folder.
        deep: read every file and compare digests; otherwise compare sizes only.
        only: names of the files to check; by default all.

    Returns:
        The first problem, as a sentence that names the file; None if there is none.
    """
    try:
        files = read_manifest(path)["files"]
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        if only is not None and name not in only:
            continue
        file = path / name
        try:
            size = file.stat().st_size  # cheap, and enough to find a truncated file
            if size != expected["bytes"]:
                return f"{file} has {size} bytes, {MANIFEST} states {expected['bytes']}; it is truncated or damaged."
            if deep and (found := atomic_io.digest(file).sha256) != expected["sha256"]:
                states = f"{MANIFEST} states {expected['sha256'][:12]}..."
                return f"{file} has SHA-256 {found[:12]}..., {states}; it is damaged."
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}."
    return None


def step_folders(run: str | Path) -> dict[int, Path]:
    """Step folders of a run by step, the highest first; complete or not."""
    found = {}
    for path in (Path(run) / "checkpoints").glob("step-*"):
        match = STEP.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def newest_complete(run: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The complete checkpoint with the highest step, every file verified; and the problem of each newer checkpoint."""
    damaged: dict[Path, str] = {}
    for path in step_folders(run).values():
        problem = verify(path)  # hashes every file: a flipped bit would otherwise go unnoticed into training
        if problem is None:
            return path, damaged
        damaged[path] = problem
    return None, damaged


def rename_damaged(damaged: Path) -> Path:
    """Rename a damaged checkpoint, which frees its step's folder name; return the new path. Nothing is deleted."""
    target, number = damaged.with_name(damaged.name + DAMAGED), 1
    while target.exists():
        number += 1
        target = damaged.with_name(f"{damaged.name}{DAMAGED}-{number}")
    atomic_io.move(damaged, target)
    return target


def write_pointer(file: Path, checkpoint: Path) -> None:
    """Write the name of a checkpoint to `latest` or `best`, atomically."""
    atomic_io.replace(file, checkpoint.name + "\n")


def read_pointer(file: Path) -> Path:
    """The checkpoint whose name is in the pointer file, `latest` or `best`; it may not exist.

    Raises:
        ValueError: the file does not name a step folder.
    """
    name = file.read_text(encoding="utf-8", errors="replace").strip()
    if not STEP.fullmatch(name):
        raise ValueError(f"{file} names {name[:80]!r}, which is not a step folder; write the name of one into it.")
    return file.parent / name


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the pointer RUN/checkpoints/best; None without one, or, with a warning, if it is damaged."""
    try:
        return read_pointer(folder / BEST) if (folder / BEST).is_file() else None
    except ValueError as error:
        logger.warning("%s", error)
        return None


def expired_checkpoints(run: str | Path, keep: int) -> list[Path]:
    """Checkpoints to delete: all older than the newest `keep` complete ones, except the best.

    Incomplete checkpoints are deleted too, unless they are newer than every complete one: a resume reports those.
    """
    best = best_checkpoint(Path(run) / "checkpoints")
    found, complete_count = [], 0
    for path in step_folders(run).values():
        complete = (path / MANIFEST).is_file()
        complete_count += complete
        # Highest step first: `complete_count` includes this checkpoint and all newer ones.
        expired = complete_count > keep if complete else complete_count > 0
        if expired:
            found.append(path)
    return [path for path in found if path != best]


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: a checkpoint that is deleted halfway does not count as complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    atomic_io.sync(checkpoint)  # otherwise the other deletions could reach the disk before this one
    shutil.rmtree(checkpoint)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder for a path: a run (its latest), RUN/checkpoints/latest or best, or a step folder.

    Only the manifest and the trained tensors must exist: it may be a copy for evaluation, without optimizer states.

    Raises:
        ValueError: there is none, or its trained tensors are missing or have another size.
    """
    path = Path(path)
    found = path
    if path.name in (LATEST, BEST) and path.is_file():
        found = read_pointer(path)
    elif has_checkpoint(path):
        found = _latest(path)
    if not (found / MANIFEST).is_file():
        raise ValueError(
            f"{found} holds no complete checkpoint ({MANIFEST} is missing); give a run, a step folder, or "
            "checkpoints/best of a run with validation (train.eval_every)."
        )
    problem = verify(found, deep=False, only={TENSORS})
    if problem is not None:
        raise ValueError(f"{problem.removesuffix('.')}; copy the checkpoint again, or give another step folder.")
    return found


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has saved a checkpoint, complete or not."""
    return bool(step_folders(run)) or (Path(run) / "checkpoints" / LATEST).is_file()


def newest(run: str | Path) -> Path | None:
    """The checkpoint that `find_checkpoint` finds in the folder of a run; None if the run has saved none."""
    return find_checkpoint(run) if has_checkpoint(run) else None


def is_trained(run: str | Path, steps: int) -> bool:
    """Whether a run has a checkpoint of its last step.

    Args:
        run: folder of the run.
        steps: number of its optimizer steps, `train.steps`.
    """
    found = newest(run)
    return found is not None and found.name == step_folder(run, steps).name


def weights_sha256(checkpoint: Path) -> str:
    """SHA-256 of the trained tensors as the manifest states it; equal to that of the score files of their evaluations.

    Raises:
        ValueError: the manifest cannot be read.
    """
    return named_sha256({TENSORS: read_manifest(checkpoint)["files"][TENSORS]["sha256"]})


def is_newer(file: Path, checkpoint: Path) -> bool:
    """Whether a result exists and is not older than the checkpoint that it was made from."""
    return file.is_file() and file.stat().st_mtime >= (checkpoint / MANIFEST).stat().st_mtime


def _latest(run: Path) -> Path:
    """The checkpoint of the pointer `latest`; the newest complete one if the pointer or its checkpoint is missing.

    A run that was killed before it wrote `latest` has none, or an older one.
    """
    file = run / "checkpoints" / LATEST
    named = read_pointer(file) if file.is_file() else None
    if named is not None and named.is_dir():
        return named
    complete = (path for path in step_folders(run).values() if verify(path, deep=False, only={TENSORS}) is None)
    return next(complete, named or run)


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest, in canonical JSON."""
    return json_sha256(content)
