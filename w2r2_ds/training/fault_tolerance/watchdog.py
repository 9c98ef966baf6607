"""Hangs and deaths become errors: every rank says what it is doing, rank 0 judges, and all end with the same sentence.

Two threads per rank. One reports to the board (training/fault_tolerance/heartbeat_store.py) and reads the verdict;
on rank 0 it also judges
(training/fault_tolerance/hang_detector.py). It may block for ever in a call to a machine that is gone, so the other
one keeps the time and ends
the process: no exception can reach a main thread that hangs in a collective.
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
"""Seconds between two looks of the thread that keeps the time."""
COLLECTIVES = ("torch.distributed.", "deepspeed.")
"""Where a main thread that stands still waits for other ranks: their Python functions end in calls of C++."""
LAST_WORDS = 10.0
"""Seconds in which a process that ends must have said why; a full pipe cannot hold it longer."""


class Watchdog:
    """Watches from the start of a ``with`` block, which every rank enters and leaves, to its end.

    An exception that all ranks raise goes its way, and so does a user's mistake that only one raises; whoever cannot
    raise it, because it waits in a collective, ends the process. So does a rank that failed otherwise: its traceback is
    printed first.

    Args:
        limits: how long is too long.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.activity = limits, Activity()
        self._kind, self._words, self._beat = RUNNING, "", 0
        self._looping = self._ended = False
        self._verdict: Diagnosis | None = None
        self._over = self._lost = False
        self._contacts = 0
        self._wake, self._ending = threading.Event(), threading.Lock()
        self._main = threading.get_ident()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self.board = HeartbeatStore()
        self.rank, self.world, self.host = dist.get_rank(), dist.get_world_size(), socket.gethostname()
        self.judge = HangDetector(self.limits, self.world)
        for work in (self._report, self._guard):
            self._threads.append(threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def start_hang_detection(self) -> None:
        """Apply `Limits.hang` from now on; before the training loop a rank may stand still for long (loading)."""
        self.activity.at(self.activity.phase)
        self._looping = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._ending.locked():
            time.sleep(3600)  # the process is about to end: what the main thread meets now is a consequence
        if error is None:
            self._kind = LEFT
        else:
            self._kind = MISTAKE if isinstance(error, MISTAKES) else FAILURE
            self._words = message(" ".join((str(error) if self._kind == MISTAKE else repr(error)).split()))[:600]
        before = self._contacts
        self._wake.set()
        # Rank 0 stays until it has heard of everybody; another rank that is through leaves as soon as it has said so.
        while not self._over and self._verdict is None and not self._lost:
            if error is None and self.rank != 0 and self._contacts >= before + 2:
                break
            time.sleep(TICK / 5)
        verdict = self._unreachable() if self._lost and self._kind == FAILURE else self._verdict
        if verdict is not None and self._kind != MISTAKE:
            self._end(verdict, error)
        if error is not None or self.rank == 0:
            self._leave()
        self._ended = True
        self._wake.set()
        for thread in self._threads:
            thread.join(1.0)  # it may hang in a call to a machine that is gone

    def _report(self) -> None:
        """The thread that talks to the board."""
        while not self._ended:
            # Before the state is made, so that a change of it that comes later is posted at once.
            self._wake.clear()
            try:
                self.board.post(self._state())
                if self.rank == 0:
                    self._decide()
                for verdict in self.board.verdict():
                    self._verdict, self._over = verdict, verdict is None
                self._contacts += 1
            except dist.DistError:  # rank 0 is gone, or the way to it: `_guard` counts, and says so
                if self._kind == LEFT:
                    self._lost = True
                    return
                time.sleep(self.limits.gone / 4)  # PyTorch warns at length each time
            self._wake.wait(self.limits.beat if self._kind == RUNNING else TICK)

    def _state(self) -> State:
        now, at = time.monotonic(), self.activity
        self._beat += 1
        here, waits = position(sys._current_frames()[self._main])
        return State(
            beat=self._beat,
            host=self.host,
            step=at.step,
            phase=at.phase,
            module=at.module,
            moves=at.moves,
            still=now - at.moved,
            here=here,
            waits=waits,
            looping=self._looping,
            kind=self._kind,
            words=self._words,
        )

    def _decide(self) -> None:
        if self._verdict is not None or self._over:
            return
        states = self.board.states()
        verdict = self.judge.look(states, time.monotonic())
        if verdict is not None or all(state.kind != RUNNING for state in states):
            self.board.decide(verdict)

    def _guard(self) -> None:
        """The thread that keeps the time; it counts its own ticks, so that it cannot oversleep."""
        missed, seen = 0.0, 0
        while not self._ended:
            time.sleep(TICK)
            missed = missed + TICK if seen == self._contacts else 0.0
            seen = self._contacts
            inside = self._kind == RUNNING
            if self._verdict is not None and inside:
                self._end(self._verdict)
            elif self.rank != 0 and missed >= (self.limits.gone if inside else self.limits.settle):
                self._lost = True
                if inside:
                    self._end(self._unreachable())

    def _unreachable(self) -> Diagnosis:
        """What a rank says that cannot reach rank 0."""
        line = (
            f"rank 0 ({os.environ['MASTER_ADDR']}) is gone, or the network to it: rank {self.rank} ({self.host}), at "
            f"{self._state().where()}, cannot reach it; look for its end in its own log and in its machine's"
        )
        return Diagnosis(LOST, line, "")

    def _end(self, verdict: Diagnosis, error: BaseException | None = None) -> None:
        """Say why, after the main thread's own error if it has one, and end the process.

        Both threads and the main one may come here; the first one does it.
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)
        last = threading.Timer(LAST_WORDS, os._exit, (verdict.code,))
        last.daemon = True
        last.start()
        if error is not None:
            traceback.print_exception(error)
        said = [f"watchdog, rank {self.rank}: {verdict.line} (exit code {verdict.code})"]
        if self.rank == 0:
            said.append(verdict.table)
        if verdict.code != FAILED and self._kind == RUNNING:
            frame = sys._current_frames().get(self._main)
            said += [f"rank {self.rank} is here:", *map(str.rstrip, traceback.format_stack(frame))]
        sys.stderr.write("\n".join(said) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave()
        os._exit(verdict.code)

    def _leave(self) -> None:
        """Say that this rank has read what there is to read; rank 0, whose board goes with it, waits for the others."""
        before, self._kind = self._contacts, LEFT
        self._wake.set()
        deadline = time.monotonic() + (2 * self.limits.beat + 1 if self.rank == 0 else 1.0)
        while time.monotonic() < deadline and not self._lost:
            if self._contacts >= before + 2 and (self.rank != 0 or self._others_left()):
                return
            time.sleep(TICK / 5)

    def _others_left(self) -> bool:
        """Whether every other rank has left, or has not been heard for a while."""
        silences = self.judge.silent[1:]
        pairs = zip(self.board.states()[1:], silences, strict=True)
        return all(state.kind == LEFT or silent > 2 * self.limits.beat for state, silent in pairs)


def position(frame: FrameType) -> tuple[str, bool]:
    """The function that a thread is in, with file and line; and whether it waits there for other ranks."""
    code = frame.f_code
    here = f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
    return here, frame.f_globals.get("__name__", "").startswith(COLLECTIVES)
