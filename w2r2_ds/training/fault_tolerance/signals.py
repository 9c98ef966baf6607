"""SIGUSR1, SIGTERM and Ctrl-C stop a run at the next step boundary, on all ranks at the same step.

Slurm sends SIGUSR1 before its time limit (``--signal``) or before a preemption
(``PreemptParameters=send_user_signal``). SIGTERM comes from scancel, or announces a preemption on other clusters.
SIGINT is Ctrl-C: of a terminal to all processes of the launch, or forwarded by the launcher (torchrun as SIGINT,
deepspeed as SIGTERM). A second SIGINT ends the process at once.

The handler only sets a flag, so repeated other signals have no further effect. System calls that it interrupts (in a
save, a collective, a read) are restarted by the kernel (SA_RESTART).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from w2r2_ds.training.fault_tolerance.exit_codes import DONE, INTERRUPTED, REQUEUE, TERMINATED

logger = logging.getLogger(__name__)

CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: TERMINATED, signal.SIGINT: TERMINATED}
"""Exit code of each signal. With several signals the largest code is used: SIGTERM takes precedence over SIGUSR1."""


class StopSignals:
    """Context manager that handles the signals, and lets all ranks stop at the same step.

    Enter it in the main thread before any fork. After the block the signals are ignored: Python removes its handlers
    while it exits, and a late signal would change the exit code. A rank that has not entered it handles no signals of
    its own, but stops with the others.

    Attributes:
        code: exit code of the signals that this rank has received; `DONE` without one.
    """

    def __init__(self) -> None:
        self.code = DONE
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> StopSignals:
        # The main thread may be in compiled code that does not return (a collective that hangs), where Python calls no
        # handler. Python's C handler writes the number of every signal to this socket at once, also then.
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._end_at_second_interrupt, name="Ctrl-C", daemon=True)
        self._thread.start()
        for number in CODES:
            signal.signal(number, self._handle)
            # signal.signal disables SA_RESTART; without it a blocking call of a C++ library fails with EINTR.
            signal.siginterrupt(number, False)
        return self

    def __exit__(self, *_: object) -> None:
        for number in CODES:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        # This ends the thread. `close` is not enough: a forked process, such as a worker of a data loader, has the
        # socket too.
        self._wakeup.shutdown(socket.SHUT_RDWR)
        self._wakeup.close()
        # The thread has a reference to this object and its process group. If it still ran while Python exits, gloo's
        # group would be freed too late, and abort the process with "terminate called without an active exception".
        self._thread.join()

    def _end_at_second_interrupt(self) -> None:
        """Thread: count SIGINTs."""
        with self._signals as signals:
            interrupts = 0
            while number := signals.recv(1):
                interrupts += number[0] == signal.SIGINT
                if interrupts == 1 and number[0] == signal.SIGINT:
                    logger.info("stopping after this step, with a checkpoint; press Ctrl-C again to end at once")
                if interrupts == 2:
                    os._exit(INTERRUPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: a save here would run in the middle of a step, and on this rank only.
        self.code = max(self.code, CODES[signal.Signals(number)])

    def join(self, timeout: timedelta) -> None:
        """Create the process group of `agreed`. Collective, once per run.

        gloo on the CPU: a reduction with NCCL would wait for all work queued on the GPU.

        Args:
            timeout: time-out of a reduction.
        """
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None

    def agreed(self) -> int:
        """The exit code with which to stop now, or `DONE` to continue. Collective: the same value on every rank.

        A signal reaches the ranks at different times, or only one of them. If each rank used its own flag, one would
        save while the others wait for it in the next step's collectives. Therefore the flags are reduced (maximum)
        before every step.
        """
        if self._group is None:  # one rank
            return self.code
        code = torch.tensor(self.code)
        dist.all_reduce(code, dist.ReduceOp.MAX, self._group)
        return int(code)
