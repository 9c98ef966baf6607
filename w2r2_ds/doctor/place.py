"""Where this process stands in a launch, from the variables that slurm/rank.sh, deepspeed and torchrun set."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass

SCONTROL_SECONDS = 5


@dataclass(frozen=True)
class Place:
    """One rank of a launch, or a process alone.

    Args:
        rank: global rank.
        world: number of ranks.
        local_rank: on its node.
        local_world: ranks on its node, 1 where the launcher does not say it.
        host: the node's name, as Slurm says it where it does.
        address: of rank 0, empty alone.
        port: of rank 0's store, 0 alone.
        hosted: whether torchrun's agent holds the store, so that rank 0 joins it as the others do.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = ""
    address: str = ""
    port: int = 0
    hosted: bool = False

    @property
    def leads(self) -> bool:
        """Whether this rank looks at its node, on behalf of all of them."""
        return self.local_rank == 0


def find_place() -> Place:
    """The place of this process.

    Raises:
        ValueError: the variables of a launch are not all there, or are no numbers.
    """
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Place(host=host)
    try:
        return Place(
            rank=int(os.environ["RANK"]),
            world=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world=_local_world(),
            host=host,
            address=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except KeyError as error:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error.args[0]} is not set; start the ranks with "
            "slurm/rank.sh, deepspeed or torchrun, or unset WORLD_SIZE."
        ) from None


def _local_world() -> int:
    """As torchrun, deepspeed and Slurm call it."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def allocated_hosts() -> list[str]:
    """The nodes of the Slurm job; empty outside of one, the unexpanded list where scontrol does not answer."""
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not re.search(r"[\[,]", names):
        return [names] if names else []
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", names],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [names]
    return done.stdout.split()
