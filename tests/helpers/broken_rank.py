"""A rank of the doctor with a fault: ``broken_rank.py FAULT OPTION...``, for the tests of whole launches.

clock: the clock is 30 s ahead. freeze: the process is stopped when it enters an all-reduce, as by a dying node.
sum: the all-reduce gives a wrong sum on rank 1. impatience: no fault, but others are waited for 2 s only. haste: no
fault, but the all-reduce has 8 s only. vanish: rank 0 ends as soon as rank 1 has come. dead: the recipe is a
pipe that nobody fills, taken for a file on a mount that does not answer, and the thread of C rings 1 s after the look.
"""

from __future__ import annotations

import faulthandler
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


def vanish() -> None:
    """Rank 0 ends when rank 1 is about to look at its node."""
    from w2r2_ds.doctor import run

    def come(meeting: Any, seconds: float) -> None:
        meeting.gather("here", [1], seconds)
        os._exit(9)

    run.Coming = come


def read_a_dead_mount() -> None:
    """A pipe is taken for a file, and what `dump_traceback_later` was asked for comes 1 s after the look at it."""
    ring, asked = faulthandler.dump_traceback_later, {}

    def ask(seconds: float, **options: Any) -> None:
        asked.update(options)
        ring(seconds, **options)

    def is_file(path: Path) -> bool:
        if path.is_fifo() and asked:
            ring(1, **{"file": 2, **asked})  # sys.stderr is caught while the command line is read
        return path.is_fifo() or os.path.isfile(path)

    faulthandler.dump_traceback_later, Path.is_file = ask, is_file


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault == "clock":
        break_clock()
    elif fault == "impatience":
        from w2r2_ds.doctor import run

        run.CAME = run.COMING = 2.0
    elif fault == "haste":
        from w2r2_ds.doctor import run

        run.REDUCE = 8.0
    elif fault == "vanish":
        vanish()
    elif fault == "dead":
        read_a_dead_mount()
    elif fault != "none":
        break_all_reduce(fault)
    sys.argv[0] = str(LAUNCHER)
    runpy.run_path(str(LAUNCHER), run_name="__main__")
