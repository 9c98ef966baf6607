"""Start the process group: ports, time limits, and where DeepSpeed compiles its extensions."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from datetime import timedelta
from pathlib import Path


def free_port() -> int:
    """A port on which nothing listens now, for the launcher's `--master_port`; another program may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def collective_timeout(hang_seconds: float) -> timedelta:
    """How long a collective waits: longer than the watchdog, which speaks first and says more.

    At least half an hour: in the set-up, where no limit of `train.hang_seconds` holds, ranks wait for the one that
    reads its weights slowest.
    """
    return timedelta(seconds=max(1800.0, 2 * hang_seconds))


def own_extensions() -> None:
    """Give this start of a job a folder of its own for what DeepSpeed compiles, unless TORCH_EXTENSIONS_DIR names one.

    In the folder that all jobs of a user share, the lock of a build that was killed lets every later run hang without
    a word. The ranks of a machine share the folder (their Slurm step, or their launcher's process, is the same), so
    that a kernel is built once per start and machine; whoever wants to keep it names a folder.

    Raises:
        ValueError: somebody else could put compiled code there.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    slurm = [os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
    start = "-".join(filter(None, slurm)) if slurm[0] else f"launcher-{os.getppid()}"
    mine = Path(tempfile.gettempdir()) / f"w2r2-ds-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    found = mine.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{mine}, where DeepSpeed would compile, is no folder or others may write to it; remove it, or name a "
            "folder of your own in TORCH_EXTENSIONS_DIR."
        )
    os.environ["TORCH_EXTENSIONS_DIR"] = str(mine / f"extensions-{start}")


def join_ranks(hang_seconds: float = 0.0) -> None:
    """Meet the other ranks of the launcher; without a launcher this process is the only one.

    Args:
        hang_seconds: of the run's configuration, see `collective_timeout`.

    Raises:
        ValueError: see `own_extensions`; or another run has this machine's port.
        Unreachable: the ranks cannot meet otherwise; under Slurm also at a port that is taken, for the next start has
            another one.
    """
    import deepspeed
    import torch
    from torch.distributed import DistError

    from w2r2_ds.training.fault_tolerance.exit_codes import Unreachable

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own_extensions()
    skip_shm_build()
    try:
        deepspeed.init_distributed(timeout=collective_timeout(hang_seconds))
    except DistError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) and "SLURM_JOB_ID" not in os.environ:
            raise ValueError(
                f"port {port} of this machine is taken, probably by another run; start this one with a port of its "
                f"own: deepspeed --master_port {free_port()} launchers/train.py ..."
            ) from None
        raise Unreachable(
            f"the ranks cannot meet at {address}, port {port} ({' '.join(str(error).split())}); check the launcher's "
            "--master_addr and --master_port."
        ) from error


def skip_shm_build() -> None:
    """On a CPU, keep DeepSpeed from compiling its shared-memory all-reduce; call before `init_distributed`.

    The build needs a C++ compiler and Python's headers and hangs for ever on the lock of a build that was killed;
    gloo does the same work. DeepSpeed keeps this table to be edited (deepspeed/ops/__init__.py).
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
