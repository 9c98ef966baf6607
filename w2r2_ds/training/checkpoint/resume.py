"""Resume a run: find the newest complete checkpoint, load it on any number of ranks, take over the run.

On the same number of ranks, every rank reads its own shard and random state: batches, masks and weights are the same.
On a CPU training continues bitwise identically. On a GPU it is equal up to rounding, because the backward passes of
attention and of indexing add in no fixed order. On another number of ranks, rank 0 converts the shards to DeepSpeed's
universal format, which any number of ranks can read. Then the global batches are the same, and the losses are equal up
to rounding without dropout, whose masks differ per rank.

The position in the data needs no state: the samples of a global batch depend on the step alone (data/sampler.py).
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.checkpoint.deepspeed_io import (
    ENGINE,
    SafeCheckpointEngine,
    check_safe_pickles,
    load,
    safe_loading,
)
from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    PARTIAL,
    best_checkpoint,
    has_checkpoint,
    newest_complete,
    read_manifest,
    rename_damaged,
    step_folders,
    verify,
    write_pointer,
)
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.fault_tolerance.exit_codes import RetryableError
from w2r2_ds.utils.distributed import on_rank_zero, raise_on_all_ranks
from w2r2_ds.utils.files.output_folder import check_writable
from w2r2_ds.utils.rng import reseed, rng_state, set_rng_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that a run starts from.

    Attributes:
        checkpoint: folder of the checkpoint, None for a fresh run.
        world_size: number of ranks that wrote it.
        damaged: newer checkpoints that are damaged, with the problem of each.
        highest: the step folder with the highest step, complete or not.
        kernels: the manifest's kernels, if `model.kernels: auto` chose them (kernels/saved_selection.py).
    """

    checkpoint: Path | None = None
    world_size: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    highest: Path | None = None
    kernels: dict[str, Any] | None = None

    @property
    def needs_conversion(self) -> bool:
        """Whether the number of ranks has changed, so that the shards must be converted."""
        return self.checkpoint is not None and self.world_size != dist.get_world_size()


def find_start(config: RunConfig) -> StartPoint:
    """Find the newest complete checkpoint; rank 0 verifies it and warns of damaged newer ones. Collective.

    Changes nothing on disk, because later checks may still stop the run.

    Raises:
        ValueError: `out` cannot be written; `resume` is ``none`` but checkpoints exist; no checkpoint is complete; a
            file contains pickled code; or a rank cannot read the files (a path that is not shared between machines).
    """
    # Rank 0 reads and hashes every file. The others compare sizes: enough to check that they have the same folder.
    start = on_rank_zero(lambda: _find_start(config))
    with raise_on_all_ranks():
        if start.checkpoint is not None and (problem := verify(start.checkpoint, deep=False)) is not None:
            raise ValueError(f"rank {dist.get_rank()} cannot read the checkpoint that rank 0 verified: {problem}")
    return start


def _find_start(config: RunConfig) -> StartPoint:
    """`find_start` on rank 0, without the other ranks' check."""
    check_writable(config.out)
    if not has_checkpoint(config.out):
        return StartPoint()
    if config.resume == "none":
        raise ValueError(f"{config.out} already has checkpoints; pass --resume auto to continue, or use another --out.")
    newest, damaged = newest_complete(config.out)
    if newest is None:
        first = next(iter(damaged.values()), f"{config.out}/checkpoints has no step folder.")
        raise ValueError(f"no checkpoint of {config.out} is complete; restore one, or use another --out: {first}")
    for problem in damaged.values():
        logger.warning("%s Resuming from %s instead.", problem, newest.name)
    # Before anything is loaded: the shards and random states are pickles.
    check_safe_pickles(*sorted(newest.rglob("*.pt")))
    saved = read_manifest(newest)
    highest = next(iter([*damaged, newest]))
    start = StartPoint(newest, int(saved["world_size"]), damaged, highest, saved.get("kernels"))
    if start.needs_conversion and saved.get("zero_stage") == 0:
        raise ValueError(
            f"{newest} was written by {start.world_size} rank(s) without ZeRO, which DeepSpeed cannot convert for "
            f"{dist.get_world_size()}; start as many ranks as before."
        )
    return start


def take_over(config: RunConfig, start: StartPoint) -> OwnershipToken:
    """Claim the run's ownership token and rename damaged checkpoints. Collective; called after all input checks.

    Raises:
        ValueError: the run's folder cannot be written.
        RetryableError: since `find_start`, an older launch of this run has saved a newer checkpoint. Other ranks raise
            RuntimeError.
    """

    def claim() -> OwnershipToken:
        try:
            # Claim first, then search for a newer checkpoint. In the other order an older launch could save one between
            # the two; after the claim it stops at its next check.
            token = OwnershipToken.claim(config.out)
            if next(iter(step_folders(config.out).values()), None) != start.highest:
                raise RetryableError(
                    f"another process of the run {config.out} has saved a checkpoint while this one loaded; "
                    "this one stops. The same command resumes from that checkpoint."
                )
            for path in start.damaged:
                logger.info("%s is kept as %s", path, rename_damaged(path).name)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: cannot be written ({error.strerror}); free disk space, or use another --out."
            ) from None
        return token

    return on_rank_zero(claim)


def resume(engine: DeepSpeedEngine, start: StartPoint, config: RunConfig) -> int:
    """Load weights, optimizer, schedule and random state; return the number of completed optimizer steps. Collective.

    Args:
        engine: a new engine; its trained weights and states are replaced.
        start: result of `find_start`, with a checkpoint that passed `check_resumable`.
        config: run configuration.

    Raises:
        ValueError: the disk is too full to convert the checkpoint for another number of ranks.
    """
    path = start.checkpoint
    assert path is not None
    engine.checkpoint_engine = SafeCheckpointEngine()
    # Not strict: the shards have trained tensors only; the frozen weights were loaded with the model.
    if not start.needs_conversion:
        with safe_loading():
            engine.load_checkpoint(str(path), tag=ENGINE, load_module_strict=False)
    else:
        logger.info("%s was written by %d rank(s); converting it for %d", path, start.world_size, dist.get_world_size())
        with converted(path) as folder, restore_group_options(engine), safe_loading():
            engine.load_checkpoint(str(folder), tag=ENGINE, load_module_strict=False)
    step = int(read_manifest(path)["step"])
    # A rank beyond the number of ranks that saved has no random state: it gets a new one, different for every step.
    random_state = path / f"rng-{dist.get_rank()}.pt"
    if random_state.is_file():
        set_rng_state(load(random_state))
    else:
        reseed(config.train.seed, dist.get_rank(), step)
    return step


@contextmanager
def converted(path: Path) -> Iterator[Path]:
    """Context with a checkpoint's shards in DeepSpeed's universal format, in a temporary folder beside it. Collective.

    Raises:
        ValueError: the disk is full, or DeepSpeed cannot convert it.
    """
    folder = on_rank_zero(lambda: _convert(path))
    yield folder
    # Not in a `finally`: after an error a failed rank would wait in this barrier while the others wait elsewhere. The
    # next launch removes the folder then (`OwnershipToken.remove_partial`).
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(path: Path) -> Path:
    """Convert the shards to DeepSpeed's universal format, in a temporary folder beside the checkpoint."""
    from deepspeed.checkpoint.ds_to_universal import main

    shards = path / ENGINE
    # A random name: this launch does not own the run yet, and two launches may convert at the same time.
    folder = path.with_name(f"{path.name}.universal.{secrets.token_hex(4)}{PARTIAL}")
    options = SimpleNamespace(
        input_folder=str(shards),
        output_folder=str(folder / ENGINE),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Below ZeRO-3 the script requires a version number that only Megatron-DeepSpeed writes; this adds it.
        inject_missing_state=True,
    )
    random_state = rng_state()  # restored below: a conversion on rank 0 must not change its later random numbers
    try:
        (folder / ENGINE).mkdir(parents=True)
        with safe_loading(), redirect_stdout(StringIO()):
            main(options)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError on a full disk
        shutil.rmtree(folder, ignore_errors=True)
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{shards} cannot be converted for another number of ranks ({cause}); free disk space for a second "
            "checkpoint beside it, or start as many ranks as before."
        ) from error
    set_rng_state(random_state)
    return folder


@contextmanager
def restore_group_options(engine: DeepSpeedEngine) -> Iterator[None]:
    """Context for loading a universal checkpoint; corrects ZeRO-3's optimizer (deepspeed/runtime/zero/stage3.py).

    DeepSpeed gives all parameter groups the options of the first one, and all of them the same step-counter tensor,
    which each group's update would then increment. Afterwards every group has its own options again, with the learning
    rate of the loaded schedule, and every parameter its own counter.
    """
    groups = engine.optimizer.optimizer.param_groups
    before = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    yield
    for group, options, rate in zip(groups, before, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(options | {"lr": rate})
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def best_until(checkpoint: Path) -> dict[str, Any] | None:
    """Metric and value of the best checkpoint up to `checkpoint`, from which a run resumes; None if there is none.

    If `checkpoint` itself is the best, the pointer `best` is written: a killed run may not have written it. A best
    checkpoint that is missing, or newer than `checkpoint`, is ignored. Collective.
    """
    return on_rank_zero(lambda: _best_until(checkpoint))


def _best_until(checkpoint: Path) -> dict[str, Any] | None:
    """`best_until` on rank 0."""
    manifest = read_manifest(checkpoint)
    if manifest["best"] is not None:  # this checkpoint was the best so far when it was saved
        write_pointer(checkpoint.parent / BEST, checkpoint)
        return dict(manifest["best"])
    kept = best_checkpoint(checkpoint.parent)
    if kept is None or verify(kept, deep=False) is not None:
        return None
    saved = read_manifest(kept)
    return saved["best"] if saved["step"] <= manifest["step"] else None
