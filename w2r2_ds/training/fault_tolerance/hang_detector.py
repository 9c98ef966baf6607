"""From what all ranks say of themselves: whether the run can go on, else which rank is in the way. No threads here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from w2r2_ds.training.fault_tolerance.exit_codes import FAILED, LOST

RUNNING, LEFT, MISTAKE, FAILURE = "running", "left", "mistake", "failure"


@dataclass(frozen=True)
class State:
    """What a rank says of itself.

    Attributes:
        beat: how often it has said something; 0 before the first time.
        host: its machine.
        step: see `activity.Activity`, as the next three.
        phase: ...
        module: ...
        moves: ...
        still: seconds since its main thread moved.
        here: the function in which its main thread is, with its file and line.
        waits: whether that is a collective, in which it waits for other ranks. On a GPU most waiting is elsewhere: in a
            read of a value, or in the backward pass.
        looping: whether it is in the training loop; before it, standing still is no hang.
        kind: `RUNNING`; `LEFT` (done); `MISTAKE` (an error that the user can mend) or `FAILURE` (another one).
        words: of the error.
    """

    beat: int = 0
    host: str = "?"
    step: int = 0
    phase: str = ""
    module: str = ""
    moves: int = 0
    still: float = 0.0
    here: str = ""
    waits: bool = False
    looping: bool = False
    kind: str = RUNNING
    words: str = ""

    def where(self) -> str:
        """Step, phase and module in words."""
        module = f", {self.module}" if self.module else ""
        return f"step {self.step}, {self.phase or 'nothing heard yet'}{module}"


@dataclass(frozen=True)
class Diagnosis:
    """Why a run ends.

    Attributes:
        code: exit code of every rank.
        line: one sentence.
        table: every rank, as lines of text.
    """

    code: int
    line: str
    table: str


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes:
        hang: a main thread that stands still for so long hangs.
        gone: a rank not heard of for so long is gone; a store not reached for so long is gone too.
        loading: the same while no rank is in the loop yet: what a rank loads may hold Python's lock for longer.
        beat: between two reports of a rank.
        settle: how long, after a rank has failed, the others may take to fail as well, or to be seen to be gone: who is
            cut off from a dead rank fails at once, and is not the one to name.
    """

    hang: float
    gone: float = 30.0
    loading: float = 300.0
    beat: float = 2.0
    settle: float = 8.0


class HangDetector:
    """Looks at the ranks again and again.

    A rank's silence is measured by the looks of the judge, each counted as two beats at most: a judge that could not
    look for a while (a suspended machine, a long call that holds Python's lock) blames nobody for it.
    """

    def __init__(self, limits: Limits, world: int) -> None:
        self.limits = limits
        self.silent = [0.0] * world
        self._beats = [0] * world
        self._wrong = [0.0] * world
        self._last: float | None = None

    def look(self, states: Sequence[State], now: float) -> Diagnosis | None:
        """The verdict, None while there is none. `now` in seconds, of any clock that does not jump."""
        passed = 0.0 if self._last is None else min(now - self._last, 2 * self.limits.beat)
        self._last = now
        for rank, state in enumerate(states):
            heard = state.beat != self._beats[rank] or state.kind == LEFT
            self.silent[rank] = 0.0 if heard else self.silent[rank] + passed
            self._beats[rank] = state.beat
            self._wrong[rank] += passed if state.kind in (MISTAKE, FAILURE) else 0.0
        if all(state.kind != RUNNING for state in states):
            return None  # each ends by itself
        found = self._mistake(states) or self._gone(states) or self._failure(states) or self._hang(states)
        return None if found is None else Diagnosis(*found, table=self.table(states))

    def _mistake(self, states: Sequence[State]) -> tuple[int, str] | None:
        for rank, state in enumerate(states):
            if state.kind == MISTAKE and self._wrong[rank] >= self.limits.settle / 2:
                return FAILED, f"rank {rank} ({state.host}) stopped at {state.where()}: {state.words}"
        return None

    def _gone(self, states: Sequence[State]) -> tuple[int, str] | None:
        # Where another rank failed, a shorter silence tells who was the first.
        failed = any(wrong >= self.limits.settle for wrong in self._wrong)
        # One that is in the loop has met all others at the end of the set-up, whatever they have said last.
        limit = self.limits.gone if any(state.looping for state in states) else self.limits.loading
        if failed:
            limit = self.limits.settle - self.limits.beat
        longest = max(range(len(states)), key=lambda rank: self.silent[rank])
        if self.silent[longest] < limit:
            return None
        state = states[longest]
        heard = f"was last at {state.where()}" if state.beat else "has never been heard"
        return LOST, (
            f"rank {longest} ({state.host}) is gone: not heard for {self.silent[longest]:.0f} s, it {heard}; look for "
            "its end in its own log and in its machine's"
        )

    def _failure(self, states: Sequence[State]) -> tuple[int, str] | None:
        first = max(range(len(states)), key=lambda rank: self._wrong[rank])
        if self._wrong[first] < self.limits.settle:
            return None
        state = states[first]
        return LOST, f"rank {first} ({state.host}) failed at {state.where()}: {state.words}"

    def _hang(self, states: Sequence[State]) -> tuple[int, str] | None:
        """Who waits in a collective does so for another rank; of the others, who is furthest behind is in the way.

        Of ranks that are equally far, it is the one that stood still first.
        """
        running = {rank: state for rank, state in enumerate(states) if state.kind == RUNNING}
        if any(self.silent[rank] > 2 * self.limits.beat for rank in running):
            return None  # what is not heard of may be gone, which `_gone` will say
        if not any(state.looping and state.still >= self.limits.hang for state in running.values()):
            return None
        # One that waits for it may have reached the limit a report earlier.
        candidates = [rank for rank, state in running.items() if state.still >= self.limits.hang - 2 * self.limits.beat]
        places = {rank: (states[rank].waits, states[rank].step, states[rank].moves) for rank in candidates}
        first = min(candidates, key=lambda rank: (places[rank], -states[rank].still))
        state, alike = states[first], len(candidates) > 1 and len(set(places.values())) == 1
        line = f"rank {first} ({state.host}) hangs, for {state.still:.0f} s, at {state.where()}, in {state.here}"
        if state.waits or alike:
            line = f"all ranks that hang wait in collectives, for each other or for a link that is down; {line}"
        return LOST, f"{line} (train.hang_seconds is {self.limits.hang:g})"

    def table(self, states: Sequence[State]) -> str:
        """One line per rank: where it is, for how long, and what it says."""
        rows = [("rank", "host", "step", "phase", "still", "module", "function", "")]
        for rank, state in enumerate(states):
            silent = f"silent for {self.silent[rank]:.0f} s" if self.silent[rank] > 2 * self.limits.beat else ""
            said = "done" if state.kind == LEFT else silent or state.words
            seconds = f"{state.still + self.silent[rank]:.0f} s"
            module, here = state.module or "-", state.here or "-"
            rows.append((str(rank), state.host, str(state.step), state.phase, seconds, module, here, said))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
