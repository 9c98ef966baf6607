"""SIGUSR1 and SIGTERM stop a run at the next step boundary, on all ranks at the same step.

A handler only sets a flag, and what it may interrupt (a save, a collective, a read) is restarted by the system
(SA_RESTART), so that a storm of signals does no more than one.
"""

from __future__ import annotations

import signal
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from w2r2_ds.training.fault_tolerance.exit_codes import DONE, REQUEUE, TERMINATED

CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: TERMINATED}
"""What a signal makes of the exit code; the greatest wins, over signals and over ranks: SIGTERM over SIGUSR1."""


class StopSignals:
    """Which signal, if any, has asked the run to stop; listens inside a ``with`` block, in the main thread.

    Enter it before anything forks. After the block the signals are ignored: the process only ends, and Python, which
    takes its handlers away as it goes, would let a late signal change the exit code. One that is not entered hears
    only what other ranks heard.
    """

    def __init__(self) -> None:
        self.code = DONE
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> StopSignals:
        for number in CODES:
            signal.signal(number, self._heard)
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number in CODES:
            signal.signal(number, signal.SIG_IGN)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.code = max(self.code, CODES[signal.Signals(number)])

    def join(self, timeout: timedelta) -> None:
        """Make the group that `agreed` talks over; every rank calls it, once per run.

        It is of gloo and its own: the flag is reduced on the CPU, without waiting for what a GPU has in hand.
        """
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None

    def agreed(self) -> int:
        """The exit code to stop with now, `DONE` to go on; the same on every rank, which all call it."""
        if self._group is None:
            return self.code
        code = torch.tensor(self.code)
        dist.all_reduce(code, dist.ReduceOp.MAX, self._group)
        return int(code)
