"""How a run goes on: the newest whole checkpoint is found, loaded on as many ranks as there are, and taken over.

On as many ranks as before every rank reads its own shard and random state back: the losses go on bit for bit. On more
or fewer, rank 0 has DeepSpeed convert the shards to its universal form, which any number of ranks reads; then the same
global batches follow and the losses are equal up to rounding, as long as nothing is drawn at random (with dropout each
rank has another mask, as it would have had from the start).

The position in the data needs no state: which samples make a global batch depends on the step alone (data/sampler.py),
so it is right in the middle of an epoch and for every number of ranks and accumulation steps.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.checkpoint.compat import check_same_data, check_same_model, check_same_run
from w2r2_ds.training.checkpoint.deepspeed_io import ENGINE, Shards, load, refuse_programs, safe_loading
from w2r2_ds.training.checkpoint.manifest import (
    BEST,
    PARTIAL,
    best_of,
    has_checkpoint,
    newest_complete,
    point,
    read_description,
    set_aside,
    steps,
    verify,
)
from w2r2_ds.training.checkpoint.ownership import OwnershipToken
from w2r2_ds.training.fault_tolerance.exit_codes import Unreachable
from w2r2_ds.utils.distributed import on_rank_zero, raise_on_all_ranks
from w2r2_ds.utils.rng import rng_state, seed_afresh, set_rng_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None for a fresh run.
        world_size: ranks that wrote it.
        damaged: what is wrong with each checkpoint above it.
        highest: the step folder with the highest step, whole or not.
    """

    checkpoint: Path | None = None
    world_size: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    highest: Path | None = None

    @property
    def universal(self) -> bool:
        """Whether other ranks than wrote the checkpoint go on from it."""
        return self.checkpoint is not None and self.world_size != dist.get_world_size()


def find_start(config: RunConfig) -> Start:
    """The newest whole checkpoint, its files read and compared on rank 0; damaged ones above it are named.

    Every rank calls it. Nothing is changed on disk: the run may still be refused.

    Raises:
        ValueError: there are checkpoints but `resume` is none, none of them is whole, one wants to run something, or a
            rank does not see its files.
    """
    start = on_rank_zero(lambda: _find_start(config))
    with raise_on_all_ranks():
        if start.checkpoint is not None and (wrong := verify(start.checkpoint, deep=False)) is not None:
            raise ValueError(f"rank {dist.get_rank()} does not see what rank 0 sees: {wrong}")
    return start


def _find_start(config: RunConfig) -> Start:
    if not has_checkpoint(config.out):
        return Start()
    if config.resume == "none":
        raise ValueError(f"{config.out} already holds checkpoints; give --resume auto to go on, or another --out.")
    newest, damaged = newest_complete(config.out)
    if newest is None:
        first = next(iter(damaged.values()), f"{config.out}/checkpoints holds no step folder.")
        raise ValueError(f"no checkpoint of {config.out} is whole; give another --out, or bring one back: {first}")
    for wrong in damaged.values():
        logger.warning("%s Going on from %s instead.", wrong, newest.name)
    refuse_programs(*sorted(newest.rglob("*.pt")))
    saved = read_description(newest)
    start = Start(newest, int(saved["world_size"]), damaged, next(iter([*damaged, newest])))
    if start.universal and saved.get("zero_stage") == 0:
        raise ValueError(
            f"{newest} was written by {start.world_size} rank(s) without ZeRO, which DeepSpeed cannot convert for "
            f"{dist.get_world_size()}; start as many ranks as before."
        )
    return start


def take_over(config: RunConfig, start: Start) -> OwnershipToken:
    """Become the one start that writes this run; every rank calls it, when nothing is left to refuse.

    Damaged checkpoints are renamed, so that their steps can be saved again.

    Raises:
        ValueError: the run's folder cannot be written.
        Unreachable: since `find_start` an older start, which lives on somewhere, has saved a newer checkpoint. On the
            other ranks a RuntimeError.
    """

    def claim() -> OwnershipToken:
        try:
            fence = OwnershipToken.claim(config.out)
            if next(iter(steps(config.out).values()), None) != start.highest:
                raise Unreachable(
                    f"another start of {config.out} has saved a checkpoint while this one made ready; this one ends, "
                    "and the same command goes on from that checkpoint."
                )
            for path in start.damaged:
                logger.info("%s is kept as %s", path, set_aside(path).name)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: cannot be written ({error.strerror}); make room, or see --out."
            ) from None
        return fence

    return on_rank_zero(claim)


def resume(engine: Any, start: Start, config: RunConfig, data: Sequence[str]) -> int:
    """Load weights, optimizer, schedule and random state; returns the step to go on with. Every rank calls it.

    Raises:
        ValueError: the checkpoint is another model's, another run's, or of another ZeRO stage.
    """
    path = start.checkpoint
    assert path is not None
    check_same_model(path, engine.module.model)
    check_same_run(path, config)
    check_same_data(path, config, data)
    saved = read_description(path)
    stage = engine.zero_optimization_stage()
    if saved.get("zero_stage", stage) != stage:  # earlier versions did not say
        raise ValueError(
            f"{path} was written under ZeRO stage {saved['zero_stage']} and cannot be resumed under stage {stage}; "
            "give the DeepSpeed JSON of before."
        )
    engine.checkpoint_engine = Shards()
    if not start.universal:
        with safe_loading():
            engine.load_checkpoint(str(path), tag=ENGINE, load_module_strict=False)
    else:
        logger.info("%s was written by %d rank(s); converting it for %d", path, start.world_size, dist.get_world_size())
        with converted(path) as folder, own_options(engine), safe_loading():
            engine.load_checkpoint(str(folder), tag=ENGINE, load_module_strict=False)
    step = int(saved["step"])
    own = path / f"rng-{dist.get_rank()}.pt"
    if own.is_file():
        set_rng_state(load(own))
    else:
        seed_afresh(config.train.seed, dist.get_rank(), step)
    return step


@contextmanager
def converted(path: Path) -> Iterator[Path]:
    """A folder beside a checkpoint with its shards in DeepSpeed's universal form; every rank enters and leaves it.

    Raises:
        ValueError: the disk is full, or DeepSpeed cannot convert it.
    """
    beside = on_rank_zero(lambda: _convert(path))
    yield beside
    # Only where all went well: a rank that failed would wait here for others, which wait for it elsewhere. What a
    # failure leaves goes with the next start (`OwnershipToken.sweep`).
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)


def _convert(path: Path) -> Path:
    """DeepSpeed's converter (deepspeed/checkpoint/ds_to_universal.py), in this process, one worker; where it wrote."""
    from deepspeed.checkpoint.ds_to_universal import main

    shards = path / ENGINE
    # A start that lives on behind a cut link must not take it away from the one that converts now.
    beside = path.with_name(f"{path.name}.universal.{secrets.token_hex(4)}{PARTIAL}")
    options = SimpleNamespace(
        input_folder=str(shards),
        output_folder=str(beside / ENGINE),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # below ZeRO-3 it wants a version number that only Megatron writes
    )
    random_state = rng_state()
    try:
        (beside / ENGINE).mkdir(parents=True)
        with safe_loading(), redirect_stdout(StringIO()):
            main(options)
    except (OSError, RuntimeError) as error:  # of a full disk torch makes a RuntimeError
        shutil.rmtree(beside, ignore_errors=True)
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{shards} cannot be converted for another number of ranks ({said}); make room for a second checkpoint "
            f"beside it, or start as many ranks as before."
        ) from error
    set_rng_state(random_state)
    return beside


@contextmanager
def own_options(engine: Any) -> Iterator[None]:
    """Mend what a universal load of ZeRO-3 does to an optimizer with several groups (deepspeed/runtime/zero/stage3.py).

    All groups get the options of the first one: each keeps its own, and the rate of the schedule, whose state was
    loaded as well. And all share one tensor that counts the steps, so that each group's update counts for all.
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
    """What `best` was saved with, for a run that goes on from `checkpoint`; None if the best must be found afresh.

    A kill may fall between two moves: `checkpoint` itself is the best where it says so. One that is gone, or that was
    saved after `checkpoint`, is forgotten.
    """
    return on_rank_zero(lambda: _best_until(checkpoint))


def _best_until(checkpoint: Path) -> dict[str, Any] | None:
    description = read_description(checkpoint)
    if description.get("best") is not None:
        point(checkpoint.parent / BEST, checkpoint)
        return dict(description["best"])
    kept = best_of(checkpoint.parent)
    if kept is None or verify(kept, deep=False) is not None:
        return None
    saved = read_description(kept)
    return saved.get("best") if saved["step"] <= description["step"] else None
