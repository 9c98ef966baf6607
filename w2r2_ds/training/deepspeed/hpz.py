"""Fill and validate ``zero_hpz_partition_size``: hierarchical partitioning of ZeRO++ (hpZ).

With hpZ, each machine keeps a secondary copy of all weights, partitioned over its own ranks. After the first forward,
all-gathers of frozen weights stay inside the machine. The copy costs memory, and has a use with several machines only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from w2r2_ds.utils.distributed import local_world_size

FIELD = "zero_hpz_partition_size"


def common_ranks_per_machine(world_size: int) -> int:
    """Largest partition size that divides the number of ranks of every machine. Collective.

    Machines may have different numbers of ranks. If each rank used the number of its own machine, the ranks would
    create different process groups and wait for each other forever. Here all ranks compute the same value.
    """
    sizes = [0] * world_size
    dist.all_gather_object(sizes, local_world_size(world_size))
    return math.gcd(*sizes)


def fill_hpz(zero: dict[str, Any], path: str | Path, world_size: int, local_size: int) -> None:
    """Replace "auto" by the number of ranks of a machine, or by 1 (no copy) if one machine has all ranks; in place.

    Args:
        zero: section `zero_optimization` of a DeepSpeed JSON.
        path: the file, for messages.
        world_size: number of ranks.
        local_size: ranks on this machine.

    Raises:
        ValueError: the value is not a positive integer, does not divide the ranks of a machine, or the stage is not 3.
            DeepSpeed would fail much later, or use a wrong group without an error.
    """
    if FIELD not in zero:
        return
    name, size = f"{path}: zero_optimization.{FIELD}", zero[FIELD]
    if size == "auto":
        # hpZ's groups are this many consecutive ranks. They are machines only if all machines have equally many ranks.
        if local_size < world_size and world_size % local_size:
            raise ValueError(
                f'{name} is "auto", but not every machine has {local_size} ranks as this one ({world_size} in all); '
                "start as many on every machine, or write 1."
            )
        size = zero[FIELD] = local_size if local_size < world_size else 1
    if type(size) is not int or size < 1:
        raise ValueError(f'{name} is {size!r}; write "auto", the number of ranks on a machine, or 1.')
    if size == 1:
        return
    if zero.get("stage") != 3:
        raise ValueError(f"{name} is {size}, but only stage 3 shards the weights; remove it or use stage 3.")
    if world_size % size:
        raise ValueError(
            f'{name} is {size}, which does not divide the {world_size} ranks of this run; write "auto" (here '
            f"{local_size} ranks per machine) or a divisor of {world_size}."
        )
    if local_size % size:
        raise ValueError(
            f"{name} is {size}, but a machine has {local_size} ranks, so the copy would be sharded across machines; "
            f'write "auto" or a divisor of {local_size}.'
        )
