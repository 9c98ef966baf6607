"""ZeRO++'s hierarchical partitions (hpZ): every machine keeps a whole copy of the weights, shared among its ranks.

Gathers of frozen weights then stay inside a machine from the second pass on. The copy is worth its memory only where
there are several machines.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

FIELD = "zero_hpz_partition_size"


def ranks_per_machine(world_size: int) -> int:
    """As torchrun and slurm/rank.sh (LOCAL_WORLD_SIZE) or deepspeed (LOCAL_SIZE) say it; else all on one machine."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
    return int(said)


def common_ranks_per_machine(world_size: int) -> int:
    """The largest number of ranks into which every machine's can be divided; all ranks call it, and have one answer."""
    everywhere = [0] * world_size
    dist.all_gather_object(everywhere, ranks_per_machine(world_size))
    return math.gcd(*everywhere)


def fill_hierarchy(zero: dict[str, Any], path: str | Path, world_size: int, local_size: int) -> None:
    """Fill "auto", in place: the ranks of a machine, or 1 (no copy) where one machine holds all ranks.

    Args:
        zero: section `zero_optimization` of a DeepSpeed JSON.
        path: the file, for messages.
        world_size: ranks.
        local_size: ranks on this machine.

    Raises:
        ValueError: the value is no number of ranks, or cuts a machine; DeepSpeed says so much later, or not at all.
    """
    if FIELD not in zero:
        return
    size = zero[FIELD]
    if size == "auto":
        if local_size < world_size and world_size % local_size:
            raise ValueError(
                f'{path}: zero_optimization.{FIELD} is "auto", but the {world_size} ranks of this run are not '
                f"{local_size} per machine, as on this one; start as many on every machine, or write 1."
            )
        size = zero[FIELD] = local_size if local_size < world_size else 1
    if type(size) is not int or size < 1:
        raise ValueError(
            f'{path}: zero_optimization.{FIELD} is {size!r}; write "auto", the number of ranks on a machine, or 1.'
        )
    if size == 1:
        return
    if zero.get("stage") != 3:
        raise ValueError(
            f"{path}: zero_optimization.{FIELD} is {size}, but only stage 3 divides the weights; remove it or use "
            "stage 3."
        )
    if world_size % size:
        raise ValueError(
            f"{path}: zero_optimization.{FIELD} is {size}, which does not divide the {world_size} ranks of this run; "
            f'write "auto" (here {local_size} ranks per machine) or a divisor of {world_size}.'
        )
    if local_size % size:
        raise ValueError(
            f"{path}: zero_optimization.{FIELD} is {size}, but a machine has {local_size} ranks: the copy would be "
            f'shared between machines, over the link that it is to spare; write "auto" or a divisor of {local_size}.'
        )
