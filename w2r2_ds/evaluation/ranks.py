"""Several processes that evaluate together: who is who, their threads, the lock, and the one wait at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from w2r2_ds.utils.distributed import raise_on_all_ranks
from w2r2_ds.utils.file_lock import locked

PATIENCE = timedelta(days=7)
"""Of the wait at the end. Ranks finish at different times, by hours on a long set; a rank that dies ends it at once."""
SMALL = 512
"""Width of a model whose tensors are so small that a second thread costs more than it computes."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that one launcher started.

    Attributes:
        rank, world: number of this process, and how many there are.
        local_rank, local_world: likewise on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """As ``torchrun`` and ``deepspeed`` say in the environment; alone without them."""
    world = int(environment.get("WORLD_SIZE", 1))
    rank = int(environment.get("RANK", 0))
    # deepspeed names no LOCAL_WORLD_SIZE when all ranks are on one machine
    local_world = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world)))
    return Ranks(rank, world, int(environment.get("LOCAL_RANK", rank)), local_world)


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Join the other ranks, for `wait` alone; takes this rank's GPU where there are GPUs.

    gloo, not NCCL: the ranks never exchange tensors, they only wait once, and gloo's wait may be as long as one likes.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    if ranks.world == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait(ranks: Ranks) -> None:
    """Until all ranks are here."""
    if ranks.world > 1:
        dist.barrier()


@contextmanager
def alone(out: Path, name: str, ranks: Ranks) -> Iterator[None]:
    """One evaluation of this name writes into a folder: rank 0 holds the lock, and if it cannot, all ranks stop.

    Others, of another task or geometry, have files of their own there.
    """
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if ranks.rank == 0:
                what = f"{out}: {name} is being evaluated"
                stack.enter_context(locked(out / f"{name}.lock", what, "give --out another folder"))
        yield


def set_threads(ranks: Ranks, hidden: int, environment: Mapping[str, str] = os.environ) -> None:
    """Share this machine's cores among its ranks; OMP_NUM_THREADS, where it is set, has decided already.

    A small model takes one: beside other jobs, threads that wait for each other make it ten times slower.

    Args:
        ranks: for their number on this machine.
        hidden: width of the language model.
        environment: where OMP_NUM_THREADS may be.
    """
    if "OMP_NUM_THREADS" not in environment:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(1 if hidden <= SMALL else max(1, cores // ranks.local_world))
