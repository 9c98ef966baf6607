"""Watchdog: hangs and dead ranks end the run on all ranks, with the same message and exit code.

Two threads per rank:

* `_report` sends this rank's heartbeat to the store on rank 0 and reads the diagnosis; on rank 0 it also evaluates all
  heartbeats (`hang_detector.py`). It may block forever in a call to a machine that died.
* `_guard` counts time only, and so never blocks. It ends the process with ``os._exit``: an exception cannot reach a
  main thread that hangs in a collective.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from w2r2_ds.training.fault_tolerance.activity import Activity
from w2r2_ds.training.fault_tolerance.exit_codes import FAILED, LOST
from w2r2_ds.training.fault_tolerance.hang_detector import (
    FAILURE,
    LEFT,
    MISTAKE,
    RUNNING,
    Diagnosis,
    HangDetector,
    Limits,
    State,
)
from w2r2_ds.training.fault_tolerance.heartbeat_store import HeartbeatStore
from w2r2_ds.utils.sanitize import message

MISTAKES = (ValueError, FloatingPointError, torch.OutOfMemoryError)
"""Exceptions that end a run with exit code `FAILED`: the same command would raise them again."""
TICK = 0.1
"""Seconds between two checks of `_guard`."""
COLLECTIVES = ("torch.distributed.", "deepspeed.")
"""Prefixes of modules whose Python functions wait for other ranks."""
EXIT_TIMEOUT = 10.0
"""Seconds that an ending process has to print its message; a blocked output pipe delays its end no further."""


class Watchdog:
    """Context manager that ends the run on all ranks if one of them fails, dies or hangs inside the block.

    An exception that all ranks raise passes unchanged. So does an exception of `MISTAKES` that only one rank raises;
    the other ranks, which wait for it in a collective, end with the same message. A rank that fails with any other
    exception prints its traceback and ends the process.

    Args:
        limits: time limits in seconds.

    Attributes:
        activity: progress of the main thread, to be updated by the training loop.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.activity = limits, Activity()
        self._kind, self._error, self._beat = RUNNING, "", 0
        self._in_loop = self._ended = False
        self._diagnosis: Diagnosis | None = None
        self._all_left = self._store_lost = False
        self._exchanges = 0  # completed exchanges with the store; `_guard` and `_leave` wait for it to increase
        self._wake, self._ending = threading.Event(), threading.Lock()
        self._main = threading.get_ident()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self.store = HeartbeatStore()
        self.rank, self.world_size, self.host = dist.get_rank(), dist.get_world_size(), socket.gethostname()
        self.detector = HangDetector(self.limits, self.world_size)
        for work in (self._report, self._guard):
            self._threads.append(threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def start_hang_detection(self) -> None:
        """Apply `Limits.hang` from now on; before the training loop, loading has long pauses without progress."""
        self.activity.set_phase(self.activity.phase)
        self._in_loop = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ending.locked():
            time.sleep(3600)  # another thread is ending the process, which caused this error
        if error is None:
            self._kind = LEFT
        else:
            self._kind = MISTAKE if isinstance(error, MISTAKES) else FAILURE
            text = str(error) if self._kind == MISTAKE else repr(error)
            self._error = message(" ".join(text.split()))[:600]
        self._wake.set()  # send the new state at once
        # If all ranks raise an error, all of them leave normally. If only this one does, the diagnosis ends the others.
        self._wait_for_others(error)
        diagnosis = self._unreachable() if self._store_lost and self._kind == FAILURE else self._diagnosis
        if diagnosis is not None and self._kind != MISTAKE:
            self._end(diagnosis, error)
        if error is not None or self.rank == 0:
            self._leave()
        self._ended = True
        self._wake.set()
        for thread in self._threads:
            thread.join(1.0)  # it may be blocked in a call to a machine that died

    def _wait_for_others(self, error: BaseException | None) -> None:
        """Wait until all ranks have left or there is a diagnosis.

        A rank other than 0 that finished without an error leaves as soon as its last heartbeat is stored.
        """
        # The exchange in progress may have begun before the state changed; the second one from now includes it.
        before = self._exchanges
        while not self._all_left and self._diagnosis is None and not self._store_lost:
            if error is None and self.rank != 0 and self._exchanges >= before + 2:
                return
            time.sleep(TICK / 5)

    def _report(self) -> None:
        """Thread: exchange heartbeats and the diagnosis with the store."""
        while not self._ended:
            # Clear before the state is read: if the state changes afterwards, the thread wakes at once and sends it.
            self._wake.clear()
            try:
                self.store.put_state(self._state())
                if self.rank == 0:
                    self._diagnose()
                for diagnosis in self.store.diagnosis():
                    self._diagnosis, self._all_left = diagnosis, diagnosis is None
                self._exchanges += 1
            except dist.DistError:  # rank 0 or the network to it failed: `_guard` counts the time and reports it
                if self._kind == LEFT:
                    self._store_lost = True
                    return
                time.sleep(self.limits.gone / 4)  # PyTorch logs a long warning for each attempt
            self._wake.wait(self.limits.beat if self._kind == RUNNING else TICK)

    def _state(self) -> State:
        """A new heartbeat of this rank."""
        now, activity = time.monotonic(), self.activity
        self._beat += 1
        location, in_collective = position(sys._current_frames()[self._main])
        return State(
            beat=self._beat,
            host=self.host,
            step=activity.step,
            phase=activity.phase,
            module=activity.module,
            changes=activity.changes,
            idle_s=now - activity.changed_at,
            location=location,
            in_collective=in_collective,
            in_loop=self._in_loop,
            kind=self._kind,
            error=self._error,
        )

    def _diagnose(self) -> None:
        """On rank 0: evaluate all heartbeats and store the diagnosis."""
        if self._diagnosis is not None or self._all_left:
            return
        states = self.store.states()
        diagnosis = self.detector.update(states, time.monotonic())
        if diagnosis is not None or all(state.kind != RUNNING for state in states):
            self.store.put_diagnosis(diagnosis)

    def _guard(self) -> None:
        """Thread: end the process on a diagnosis, or if the store cannot be reached for too long.

        Time is the number of its own ticks, not that of a clock, so that a suspension of the process does not count.
        """
        missed, last = 0.0, 0
        while not self._ended:
            time.sleep(TICK)
            missed = missed + TICK if last == self._exchanges else 0.0
            last = self._exchanges
            running = self._kind == RUNNING
            if self._diagnosis is not None and running:
                self._end(self._diagnosis)
            # Rank 0 has the store in its own process. Another rank that cannot reach it would never get a diagnosis.
            elif self.rank != 0 and missed >= (self.limits.gone if running else self.limits.settle):
                self._store_lost = True
                if running:
                    self._end(self._unreachable())

    def _unreachable(self) -> Diagnosis:
        """Diagnosis of a rank that cannot reach rank 0."""
        line = (
            f"rank 0 ({os.environ['MASTER_ADDR']}) is gone, or the network to it: rank {self.rank} ({self.host}), at "
            f"{self._state().progress()}, cannot reach it; see the log of rank 0 and of its machine"
        )
        return Diagnosis(LOST, line, "")

    def _end(self, diagnosis: Diagnosis, error: BaseException | None = None) -> None:
        """Print the main thread's error, if any, and the diagnosis, and end the process.

        The main thread and both watchdog threads may call it; the first call ends the process.
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # until the first call ends the process
        # Ends the process in any case: a write to a pipe that is not read, or formatting a traceback, may block.
        timer = threading.Timer(EXIT_TIMEOUT, os._exit, (diagnosis.code,))
        timer.daemon = True
        timer.start()
        if error is not None:
            traceback.print_exception(error)
        lines = [f"watchdog, rank {self.rank}: {diagnosis.line} (exit code {diagnosis.code})"]
        if self.rank == 0:
            lines.append(diagnosis.table)
        if diagnosis.code != FAILED and self._kind == RUNNING:
            frame = sys._current_frames().get(self._main)
            lines += [f"rank {self.rank} is here:", *map(str.rstrip, traceback.format_stack(frame))]
        # Not `logging`: the main thread, which hangs, may hold a handler's lock.
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave()
        # Not sys.exit: it would wait for the main thread, and for NCCL's destructors.
        os._exit(diagnosis.code)

    def _leave(self) -> None:
        """Report that this rank has left. Rank 0, whose process has the store, waits until the others have left too."""
        before, self._kind = self._exchanges, LEFT
        self._wake.set()
        deadline = time.monotonic() + (2 * self.limits.beat + 1 if self.rank == 0 else 1.0)
        while time.monotonic() < deadline and not self._store_lost:
            if self._exchanges >= before + 2 and (self.rank != 0 or self._others_left()):
                return
            time.sleep(TICK / 5)

    def _others_left(self) -> bool:
        """Whether every other rank has left, or has been silent for two beats."""
        pairs = zip(self.store.states()[1:], self.detector.silent[1:], strict=True)
        return all(state.kind == LEFT or silent > 2 * self.limits.beat for state, silent in pairs)


def position(frame: FrameType) -> tuple[str, bool]:
    """Function, file and line of a thread's innermost frame; and whether it is in a collective (`COLLECTIVES`)."""
    code = frame.f_code
    location = f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
    return location, frame.f_globals.get("__name__", "").startswith(COLLECTIVES)
