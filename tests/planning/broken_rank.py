"""A rank of the doctor with a fault: ``broken_rank.py FAULT OPTION...``, for the tests of whole launches.

clock: the clock is 30 s ahead. freeze: the process is stopped when it enters an all-reduce, as by a dying node.
sum: the all-reduce gives a wrong sum on rank 1. impatience: no fault, but others are waited for 2 s only.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).parents[2] / "launchers" / "doctor.py"


def command(options: dict[str, str]) -> list[str]:
    """Options as a command line."""
    return [text for name, value in options.items() for text in (f"--{name}", value)]


def break_clock() -> None:
    """Every reading of the clock is 30 s ahead."""
    real = time.time
    time.time = lambda: real() + 30


def break_all_reduce(fault: str) -> None:
    """`torch.distributed.all_reduce` with a fault."""
    import torch.distributed as dist

    real = dist.all_reduce

    def all_reduce(values: Any, *args: Any) -> None:
        if fault == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        real(values, *args)
        if dist.get_rank() == 1:
            values[0] += 1

    dist.all_reduce = all_reduce


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault == "clock":
        break_clock()
    elif fault == "impatience":
        from w2r2_ds.planning import doctor

        doctor.CAME = 2.0
    elif fault != "none":
        break_all_reduce(fault)
    sys.argv[0] = str(LAUNCHER)
    runpy.run_path(str(LAUNCHER), run_name="__main__")
