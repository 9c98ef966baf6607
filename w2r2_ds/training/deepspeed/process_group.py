"""Initialise the process group: port, time-outs, and the folder in which DeepSpeed compiles its extensions.

A launcher starts the ranks: ``deepspeed launchers/train.py``, torchrun, or slurm/rank.sh.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from datetime import timedelta
from pathlib import Path

from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.gpus import check_gpus


def free_port() -> int:
    """A TCP port that is free now, for the launcher's `--master_port`; another program may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def collective_timeout(hang_seconds: float) -> timedelta:
    """Time-out of collectives: longer than the watchdog's time limit, so that its diagnosis comes first.

    At least half an hour: before the first step, when `train.hang_seconds` does not apply, all ranks wait for the one
    that loads its weights last.

    Args:
        hang_seconds: `train.hang_seconds`.
    """
    return timedelta(seconds=max(1800.0, 2 * hang_seconds))


def use_private_extensions_dir() -> None:
    """Set TORCH_EXTENSIONS_DIR to a folder of this launch, unless it is set already.

    In the default folder, which all jobs of a user share, a killed build leaves a lock file on which every later run
    waits forever. All ranks of a machine share the new folder (they have the same Slurm step, or the same launcher
    process), so each extension is built once per launch and machine. To keep builds, set TORCH_EXTENSIONS_DIR.

    Raises:
        ValueError: another user may write to the folder, and so could place compiled code there; or no temporary
            folder can be written.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    slurm = [os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
    launch = "-".join(filter(None, slurm)) if slurm[0] else f"launcher-{os.getppid()}"
    try:
        parent = Path(tempfile.gettempdir()) / f"w2r2-ds-{os.getuid()}"
        parent.mkdir(mode=0o700, exist_ok=True)
        # lstat, not stat: in a shared temporary folder another user may have created a symbolic link of this name.
        found = parent.lstat()
    except OSError as error:
        raise ValueError(
            f"no temporary folder for DeepSpeed's extensions can be written ({error.strerror}); set TMPDIR to one."
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{parent}, where DeepSpeed would compile, is not a folder or others may write to it; remove it, or set "
            "TORCH_EXTENSIONS_DIR to a folder of your own."
        )
    os.environ["TORCH_EXTENSIONS_DIR"] = str(parent / f"extensions-{launch}")


def init_process_group(hang_seconds: float = 0.0) -> None:
    """Initialise the default process group; without a launcher this process is the only rank.

    Args:
        hang_seconds: `train.hang_seconds`, see `collective_timeout`.

    Raises:
        ValueError: a rank has no GPU (`check_gpus`); the master port is taken (without Slurm); or see
            `use_private_extensions_dir`.
        RetryableError: the ranks cannot connect. Under Slurm also if the port is taken: a requeued job has another one.
    """
    import deepspeed
    import torch
    from torch.distributed import DistError

    from w2r2_ds.training.fault_tolerance.exit_codes import RetryableError

    if "RANK" not in os.environ:
        # No launcher. With port 0 the system chooses a free port, so that several runs fit on a machine.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    check_gpus(RankInfo.from_environment().local_world_size)
    if torch.cuda.is_available():
        # Before the process group: NCCL communicates on the current device.
        torch.cuda.set_device(RankInfo.from_environment().local_rank)
    use_private_extensions_dir()
    skip_shm_build()
    try:
        deepspeed.init_distributed(timeout=collective_timeout(hang_seconds))
    except DistError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error) and "SLURM_JOB_ID" not in os.environ:
            raise ValueError(
                f"port {port} of this machine is taken, probably by another run; start this one with its own port: "
                f"deepspeed --master_port {free_port()} launchers/train.py ..."
            ) from None
        raise RetryableError(
            f"the ranks cannot connect to {address}, port {port} ({' '.join(str(error).split())}); check the "
            "launcher's --master_addr and --master_port."
        ) from error


def skip_shm_build() -> None:
    """On a CPU, keep DeepSpeed from compiling its shared-memory all-reduce; call it before `init_distributed`.

    The build needs a C++ compiler and Python's headers, and waits forever on the lock file of a killed build. gloo
    gives the same results. DeepSpeed documents this table as editable (deepspeed/ops/__init__.py).
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
