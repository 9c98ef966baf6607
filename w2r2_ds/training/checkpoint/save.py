"""What is saved: the trained tensors, DeepSpeed's optimizer shards, and a manifest of both.

RUN/checkpoints/step-000030/trainable.safetensors   LoRA and merger, whole tensors, for evaluation and export
                            engine/                 DeepSpeed's shards, for an exact resume
                            rng-RANK.pt             every rank's random state
                            config.yaml             the resolved configuration
                            checkpoint.json         the manifest (training/checkpoint/manifest.py); written last

A checkpoint is written aside under a name of this start alone (training/checkpoint/ownership.py), flushed to the
disk, renamed; then
`latest` moves, then `best`, then old ones go. Whenever the power goes there is a whole one, the new or the old.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save

from w2r2_ds.config.io import config_text
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import fingerprint, trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.deepspeed_io import ENGINE, Part, save_shards
from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    LATEST,
    PARTIAL,
    TENSORS,
    delete,
    outdated,
    point,
    step_folder,
    steps,
    write_description,
)
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.checkpoint.weights import gather_trainable
from w2r2_ds.utils import atomic_io
from w2r2_ds.utils.atomic_io import Digest
from w2r2_ds.utils.distributed import on_rank_zero
from w2r2_ds.utils.rng import rng_state
from w2r2_ds.utils.versions import versions

logger = logging.getLogger(__name__)

MASTER_BYTES = 12
"""Of each trained number: a float32 master copy and two float32 moments."""
RANK_ALLOWANCE, TENSOR_ALLOWANCE = 100_000, 2_000
"""Bytes per rank, and per rank and trained tensor: random state, names, shapes, padding, DeepSpeed's settings."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        metrics: of that step.
        data: what the training sets hold (``data.loading.digests``).
        best: where this one has the best validation so far, by what; then `best` moves too.
    """

    step: int
    metrics: Mapping[str, float]
    data: Sequence[str]
    best: Mapping[str, Any] | None = None


def save_checkpoint(engine: Any, config: RunConfig, content: Content, fence: OwnershipToken) -> Path | None:
    """Write a checkpoint; every rank calls it.

    Returns:
        Its folder, or None if some rank could not write (a full disk): that is said, nothing is left of it, the
        checkpoints of before are as they were, and the run can go on.

    Raises:
        Fenced: another start of this run has taken over; on every rank.
    """
    aside = fence.aside(content.step)
    on_rank_zero(fence.check)
    part = Part(aside)
    if dist.get_rank() == 0:
        with part.attempt():
            shutil.rmtree(aside, ignore_errors=True)
            (aside / ENGINE).mkdir(parents=True)
    dist.barrier()
    part.save(f"rng-{dist.get_rank()}.pt", rng_state())
    save_shards(engine, part, content.step)
    tensors = gather_trainable(engine.module.model)
    if dist.get_rank() == 0:
        part.write(TENSORS, lambda writer: writer.write(save(tensors)))
        part.write("config.yaml", lambda writer: writer.write(config_text(config).encode()))
    files, failures = compare_notes(part)
    if not failures:
        check_size(files, engine.module.model)
        about = describe(engine, content, fence)
        failures = on_rank_zero(lambda: publish(config, about, files, fence, aside))
    if failures:
        give_up(config, content.step, failures, fence, aside)
        return None
    return step_folder(config.out, content.step)


def compare_notes(part: Part) -> tuple[dict[str, Digest], list[str]]:
    """What all ranks have written, and what has failed; the same on every rank."""
    notes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(notes, (part.files, part.failure))
    files = {name: digest for written, _ in notes for name, digest in written.items()}
    return files, [failure for _, failure in notes if failure is not None]


def check_size(files: Mapping[str, Digest], model: W2R2) -> None:
    """Only what trains is stored: weights whole and in a shard, master copy, moments, and the stated allowance."""
    parameters = [(p.ds_numel if hasattr(p, "ds_numel") else p.numel(), p) for p in trainable(model).values()]
    numbers = sum(count * (2 * p.element_size() + MASTER_BYTES) for count, p in parameters)
    most = numbers + dist.get_world_size() * (RANK_ALLOWANCE + TENSOR_ALLOWANCE * len(parameters))
    written = sum(digest.bytes for digest in files.values())
    assert written <= most, f"a checkpoint of {written} bytes holds more than the {most} of what trains"


def describe(engine: Any, content: Content, fence: OwnershipToken) -> dict[str, Any]:
    """The manifest without its files."""
    return {
        "step": content.step,
        "incarnation": fence.number,
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "model": fingerprint(engine.module.model),
        "metrics": dict(content.metrics),
        "best": content.best,
        "data": list(content.data),
        "versions": versions(),
    }


def publish(
    config: RunConfig, about: Mapping[str, Any], files: Mapping[str, Digest], fence: OwnershipToken, aside: Path
) -> list[str]:
    """On rank 0: manifest, rename, pointers, deletion of the old; returns what failed before the rename."""
    part, final = Part(aside), step_folder(config.out, about["step"])
    with part.attempt():
        write_description(aside, about, {**files, **copied(aside, files)})
        fence.check()
        replace_folder(aside, final)
    if part.failure is not None:
        return [part.failure]
    after = Part(final)
    with after.attempt():
        for name in (LATEST, BEST) if about["best"] is not None else (LATEST,):
            fence.check()
            point(fence.folder / name, final)
        for old in outdated(config.out, config.train.keep_last):
            fence.check()
            delete(old)
    if after.failure is not None:
        logger.warning("%s is saved, but what comes after is not done: %s.", final, after.failure)
    return []


def replace_folder(aside: Path, final: Path) -> None:
    """Rename; where there is something already (of a start that was fenced between its look and its rename), that
    goes only when the new one is there."""
    old = final.with_name(f"{aside.name.removesuffix(PARTIAL)}.old{PARTIAL}")
    if not final.exists():
        atomic_io.move(aside, final)
        return
    final.rename(old)
    try:
        atomic_io.move(aside, final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def copied(aside: Path, files: Mapping[str, Digest]) -> dict[str, Digest]:
    """Digests of what DeepSpeed put there past our writer: the swap files of an NVMe offload."""
    found = {}
    for file in sorted(path for path in aside.rglob("*") if path.is_file()):
        name = file.relative_to(aside).as_posix()
        if name not in files:
            atomic_io.sync(file)
            found[name] = atomic_io.digest(file)
    return found


def give_up(config: RunConfig, step: int, failures: Sequence[str], fence: OwnershipToken, aside: Path) -> None:
    """Remove what was written of a checkpoint that failed, and say so; a start that was fenced ends here."""
    on_rank_zero(fence.check)  # a newer start removes our folder, which looks like a failure
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    newest = next((path.name for path in steps(config.out).values()), "none")
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    if dist.get_rank() == 0:
        logger.warning(
            "the checkpoint of step %d could not be saved (%s%s); the newest checkpoint is %s.",
            step,
            failures[0],
            more,
            newest,
        )
