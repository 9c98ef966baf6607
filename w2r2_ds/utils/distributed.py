"""Rank of this process in a distributed run, and collectives for setup work and for errors.

Importing this module does not import torch: logging and ``--help`` need `RankInfo` without its import time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from w2r2_ds.utils.gpus import check_gpus

Result = TypeVar("Result")
BARRIER_TIMEOUT = timedelta(days=7)
"""Time-out of the collectives of an inference job, whose ranks may finish hours apart.

If a rank dies, its connections close and the other ranks fail at once.
"""


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process in a launch.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank on this machine, and index of its GPU.
        local_world_size: number of ranks on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Read the variables of torchrun and DeepSpeed's launcher; without them, this process is the only rank.

        Slurm's variables are not read here; slurm/rank.sh translates them. SLURM_NTASKS is also set in batch scripts
        and interactive shells, where a single process would wait for ranks that never start.

        Raises:
            ValueError: WORLD_SIZE is above 1, but RANK or LOCAL_RANK is missing.
        """
        world_size = int(environment.get("WORLD_SIZE", 1))
        if world_size == 1:
            return cls()
        for name in ("RANK", "LOCAL_RANK"):
            if name not in environment:
                raise ValueError(
                    f"WORLD_SIZE is {world_size}, but {name} is not set; start the ranks with slurm/rank.sh, deepspeed "
                    "or torchrun, or unset WORLD_SIZE."
                )
        local = local_world_size(world_size, environment)
        return cls(int(environment["RANK"]), world_size, int(environment["LOCAL_RANK"]), local)


def local_world_size(world_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks on this machine: LOCAL_WORLD_SIZE (torchrun, slurm/rank.sh), LOCAL_SIZE (deepspeed), or all.

    DeepSpeed's launcher sets neither if all ranks are on one machine.
    """
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size)


def host_name() -> str:
    """Name of this machine; under Slurm its node name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def gloo_process_group(ranks: RankInfo) -> Iterator[None]:
    """Join the ranks of an inference job and select this rank's GPU. A single rank needs no process group.

    gloo instead of NCCL: these ranks exchange only small objects, and may wait for each other for hours at the end.
    """
    import torch
    import torch.distributed as dist

    check_gpus(ranks.local_world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    if ranks.world_size == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=BARRIER_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this is rank 0 of the default process group, or the only process."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until all ranks have reached this call. Does nothing without a process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def on_rank_zero(compute: Callable[[], Result]) -> Result:
    """Call a function on rank 0 only and return its result on every rank (collective).

    Args:
        compute: a function with a picklable result. Without a process group, it is called directly.

    Raises:
        ValueError: raised by `compute` on rank 0; the same on every rank.
        RuntimeError: on the other ranks, if `compute` raised any other exception; rank 0 raises that exception.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return compute()
    failure: Exception | None = None
    result: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = compute()
        except Exception as error:
            # Raised after the broadcast; otherwise the other ranks would wait in it until their time-out.
            failure = error
            result[1] = error if isinstance(error, ValueError) else RuntimeError(f"rank 0 failed: {error!r}")
    dist.broadcast_object_list(result, src=0)
    if failure is not None:
        raise failure
    if isinstance(result[1], Exception):
        raise result[1]
    return result[0]  # type: ignore[return-value]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; if it fails on one, raise on all (collective at the end of the block).

    The block itself must not contain a collective: a rank that failed would not take part in it. Without a process
    group, exceptions pass unchanged.

    Raises:
        ValueError: with the message of the lowest rank that failed. A rank that failed with another exception type
            (a bug, not a user error) raises that exception instead.
    """
    import torch.distributed as dist

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not dist.is_initialized():
            raise
        failure = error
    if not dist.is_initialized():
        return
    # Every rank takes part, with None if it did not fail. So all ranks leave the block together, with or without error.
    own = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, own)
    if failure is not None and not isinstance(failure, ValueError):
        raise failure
    for message in messages:
        if message is not None:
            raise ValueError(message) from failure
