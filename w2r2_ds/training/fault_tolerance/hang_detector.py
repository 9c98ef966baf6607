"""Decide from the ranks' heartbeats whether a run is healthy, and which rank is at fault if not.

Pure logic; the threads are in `watchdog.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from w2r2_ds.training.fault_tolerance.exit_codes import FAILED, LOST

RUNNING, LEFT, MISTAKE, FAILURE = "running", "left", "mistake", "failure"
"""Conditions of a rank, see `State.kind`."""


@dataclass(frozen=True)
class State:
    """Heartbeat of a rank.

    Attributes:
        beat: number of this heartbeat; 0 before the first.
        host: host name of the rank's machine.
        step: optimizer step of `Activity`.
        phase: phase of `Activity`.
        module: module of `Activity`.
        changes: number of changes of `Activity`.
        idle_s: seconds since the last change.
        location: function, file and line of the main thread.
        in_collective: whether `location` is in a collective, which waits for other ranks. On a GPU most waiting is
            elsewhere: in a copy to the host, or in the backward pass.
        in_loop: whether the training loop has started; before it, a rank without progress is not a hang.
        kind: `RUNNING`; `LEFT` (finished); `MISTAKE` (an error that the user can correct) or `FAILURE` (any other).
        error: message of the error.
    """

    beat: int = 0
    host: str = "?"
    step: int = 0
    phase: str = ""
    module: str = ""
    changes: int = 0
    idle_s: float = 0.0
    location: str = ""
    in_collective: bool = False
    in_loop: bool = False
    kind: str = RUNNING
    error: str = ""

    def progress(self) -> str:
        """Step, phase and module, as text for a message."""
        module = f", {self.module}" if self.module else ""
        return f"step {self.step}, {self.phase or 'no heartbeat yet'}{module}"


@dataclass(frozen=True)
class Diagnosis:
    """Why a run ends.

    Attributes:
        code: exit code of every rank.
        line: one sentence.
        table: all ranks, as lines of text.
    """

    code: int
    line: str
    table: str


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds.

    Attributes:
        hang: longest time of a main thread without a change.
        gone: longest time without a heartbeat of a rank, or without an exchange with the heartbeat store.
        loading: replaces `gone` until a rank is in the training loop: loading may hold Python's global lock for longer.
        beat: interval between heartbeats.
        settle: time between the failure of a rank and the diagnosis. When a rank dies, the ranks connected to it raise
            errors first, although they are not the cause; in this time the dead rank becomes silent.
    """

    hang: float
    gone: float = 30.0
    loading: float = 300.0
    beat: float = 2.0
    settle: float = 8.0


class HangDetector:
    """Evaluates the heartbeats of all ranks at regular intervals.

    The silence of a rank is summed over evaluations, each counted as two beats at most. So if the detector itself did
    not run for a while (a suspended machine, a long call that held Python's global lock), no rank is reported for it.

    Attributes:
        silent: seconds without a new heartbeat, per rank.
    """

    def __init__(self, limits: Limits, world_size: int) -> None:
        self.limits = limits
        self.silent = [0.0] * world_size
        self._beats = [0] * world_size
        self._failed_for = [0.0] * world_size
        self._last: float | None = None

    def update(self, states: Sequence[State], now: float) -> Diagnosis | None:
        """Evaluate new heartbeats; None while the run is healthy.

        Args:
            states: states of all ranks.
            now: seconds of a monotonic clock.
        """
        passed = 0.0 if self._last is None else min(now - self._last, 2 * self.limits.beat)
        self._last = now
        for rank, state in enumerate(states):
            # The beat number grows while a rank's watchdog thread runs, even if its main thread hangs.
            alive = state.beat != self._beats[rank] or state.kind == LEFT
            self.silent[rank] = 0.0 if alive else self.silent[rank] + passed
            self._beats[rank] = state.beat
            self._failed_for[rank] += passed if state.kind in (MISTAKE, FAILURE) else 0.0
        if all(state.kind != RUNNING for state in states):
            return None  # every rank ends by itself
        # In order of certainty: a reported mistake, a dead rank, another failure (often its consequence), a hang.
        found = self._mistake(states) or self._gone(states) or self._failure(states) or self._hang(states)
        return None if found is None else Diagnosis(*found, table=self.table(states))

    def _mistake(self, states: Sequence[State]) -> tuple[int, str] | None:
        """A rank has stopped with an error that the user can correct."""
        # Half of `settle` gives the other ranks time to raise the same error; then every rank ends normally.
        for rank, state in enumerate(states):
            if state.kind == MISTAKE and self._failed_for[rank] >= self.limits.settle / 2:
                return FAILED, f"rank {rank} ({state.host}) stopped at {state.progress()}: {state.error}"
        return None

    def _gone(self, states: Sequence[State]) -> tuple[int, str] | None:
        """A rank has sent no heartbeat for too long: its process or machine is dead, or the network to it."""
        # A rank in the loop has passed a collective with all others, so none of them is still loading.
        limit = self.limits.gone if any(state.in_loop for state in states) else self.limits.loading
        # If another rank has failed, a shorter silence is enough: the failure is probably a consequence of a death.
        if any(seconds >= self.limits.settle for seconds in self._failed_for):
            limit = self.limits.settle - self.limits.beat
        longest = max(range(len(states)), key=lambda rank: self.silent[rank])
        if self.silent[longest] < limit:
            return None
        state = states[longest]
        last = f"it was last at {state.progress()}" if state.beat else "it never sent one"
        return LOST, (
            f"rank {longest} ({state.host}) is gone: no heartbeat for {self.silent[longest]:.0f} s, {last}; see the "
            "log of that rank and of its machine"
        )

    def _failure(self, states: Sequence[State]) -> tuple[int, str] | None:
        """A rank has raised an unexpected exception; the first one of several is reported."""
        first = max(range(len(states)), key=lambda rank: self._failed_for[rank])
        if self._failed_for[first] < self.limits.settle:
            return None
        state = states[first]
        return LOST, f"rank {first} ({state.host}) failed at {state.progress()}: {state.error}"

    def _hang(self, states: Sequence[State]) -> tuple[int, str] | None:
        """A rank in the training loop has made no progress for `Limits.hang`; find the rank at fault.

        A rank in a collective waits for another rank. Of the ranks outside a collective, the one furthest behind is at
        fault; of equal ones, the one without progress for the longest time.
        """
        running = {rank: state for rank, state in enumerate(states) if state.kind == RUNNING}
        if any(self.silent[rank] > 2 * self.limits.beat for rank in running):
            return None  # a silent rank may be dead, which `_gone` reports
        if not any(state.in_loop and state.idle_s >= self.limits.hang for state in running.values()):
            return None
        # The rank that reached the limit may wait for the one at fault, whose last change was up to a heartbeat later.
        limit = self.limits.hang - 2 * self.limits.beat
        # The rank at fault is the first in this order: not in a collective, then fewest steps, then fewest changes.
        candidates = [rank for rank, state in running.items() if state.idle_s >= limit]
        order = {rank: (states[rank].in_collective, states[rank].step, states[rank].changes) for rank in candidates}
        first = min(candidates, key=lambda rank: (order[rank], -states[rank].idle_s))
        state, all_equal = states[first], len(candidates) > 1 and len(set(order.values())) == 1
        line = (
            f"rank {first} ({state.host}) hangs, for {state.idle_s:.0f} s, at {state.progress()}, in {state.location}"
        )
        # With equal progress on every rank, none of them is at fault: probably a link between them is.
        if state.in_collective or all_equal:
            line = f"all ranks that hang wait in collectives, for each other or for a link that is down; {line}"
        return LOST, f"{line} (train.hang_seconds is {self.limits.hang:g})"

    def table(self, states: Sequence[State]) -> str:
        """Table of all ranks: step, phase, idle time, module, function, condition."""
        rows = [("rank", "host", "step", "phase", "idle", "module", "function", "")]
        for rank, state in enumerate(states):
            silent = f"silent for {self.silent[rank]:.0f} s" if self.silent[rank] > 2 * self.limits.beat else ""
            status = "done" if state.kind == LEFT else silent or state.error
            seconds = f"{state.idle_s + self.silent[rank]:.0f} s"
            module, location = state.module or "-", state.location or "-"
            rows.append((str(rank), state.host, str(state.step), state.phase, seconds, module, location, status))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
