"""Check, before anything is loaded, that the ranks of this machine can use its GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
"""Folder with a file nvidiaN per GPU of this machine or container, for any CUDA_VISIBLE_DEVICES."""


def check_gpus(local_ranks: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that torch finds a GPU for every rank of this machine, or that the machine has none.

    Without the check, a command would silently run on the CPU, or NCCL would fail after the weights are loaded.
    ``DS_ACCELERATOR=cpu`` is the explicit choice of the CPU.

    Args:
        local_ranks: number of ranks on this machine.
        environment: environment variables.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names no GPU of this machine, or fewer than there are ranks; or torch finds no
            GPU for another reason.
    """
    import torch

    if environment.get("DS_ACCELERATOR") == "cpu":
        return
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = environment.get(VISIBLE)
    if not visible:
        present = len(list(DEVICES.glob("nvidia[0-9]*")))
        if not present:
            return  # a machine without GPUs; launchers set the variable there too
        gpus = f"none of the {present} GPU(s) of this machine"
        if named is not None:
            raise ValueError(
                f"{VISIBLE} is {named!r}, which names {gpus}; name some of 0 to {present - 1}, unset it, or set "
                "DS_ACCELERATOR=cpu to use the CPU."
            )
        raise ValueError(
            f"torch {torch.__version__} finds {gpus}; install a torch for the CUDA version of the driver (nvidia-smi), "
            "or set DS_ACCELERATOR=cpu to use the CPU."
        )
    if local_ranks > visible:
        cause = f"{VISIBLE} is {named!r}, which shows" if named is not None else "this machine has"
        raise ValueError(
            f"{local_ranks} ranks were started on this machine, but {cause} {visible} GPU(s); start as many ranks as "
            "GPUs, and show all GPUs to every rank (no --gpus-per-task, no --gpu-bind)."
        )
