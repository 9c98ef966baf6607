"""Rank script: the doctor with a fault in its all-reduce.

Usage: ``broken_rank.py FAULT CONNECT_SECONDS COLLECTIVE_SECONDS OPTION...``

FAULT is ``none``; ``freeze``: SIGSTOP at the all-reduce, as on a dying node; ``sum``: a wrong sum on rank 1.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).parents[3] / "launchers" / "doctor.py"


def command(options: dict[str, str]) -> list[str]:
    """Command line of options."""
    return [text for name, value in options.items() for text in (f"--{name}", value)]


def break_all_reduce(fault: str) -> None:
    """Replace `torch.distributed.all_reduce` by one with a fault."""
    import torch.distributed as dist

    original = dist.all_reduce

    def all_reduce(values: Any, *args: Any, **options: Any) -> None:
        if fault == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        original(values, *args, **options)
        if dist.get_rank() == 1:
            values[0] += 1

    dist.all_reduce = all_reduce


if __name__ == "__main__":
    fault, connect, collective = sys.argv.pop(1), float(sys.argv.pop(1)), float(sys.argv.pop(1))
    from w2r2_ds.doctor.checks import network

    network.CONNECT_SECONDS, network.COLLECTIVE_SECONDS = connect, collective
    if fault != "none":
        break_all_reduce(fault)
    sys.argv[0] = str(LAUNCHER)
    runpy.run_path(str(LAUNCHER), run_name="__main__")
