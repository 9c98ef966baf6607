"""Two real ranks without a launcher: one start of a job, its faults, and its end.

A rank is a process that runs launchers/train.py as a script, in a session of its own, forked with the heavy packages
imported (tests/helpers/fork_server.py): a start of both ranks takes a few seconds, so that a test affords many.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import inject_in_process
from runs import ROOT, ZERO3, World

WORLD_SIZE = 2
STEPS = 6
RUN_LIMIT, END_LIMIT = 280.0, 60.0
"""Seconds: for a start that nothing happens to, and from a fault until every rank has ended."""
FAILED, LOST, REQUEUE, TERMINATED, KILLED = 1, 75, 85, 143, -int(signal.SIGKILL)
"""How a rank ends (w2r2_ds/training/fault_tolerance/exit_codes.py), and one that was killed."""
TRAIN = ROOT / "launchers" / "train.py"
OPTIONS: dict[str, object] = {
    "model__lora_dropout": 0.1,  # so that the random state matters
    "data__workers": 1,  # a killed rank leaves a loader process behind, which must end by itself
    "train__steps": STEPS,
    "train__global_batch": 4,
    "train__micro_batch": 1,  # two micro-batches to an optimizer step
    "train__save_every": 1,
    "resume": "auto",
}


def arguments(world: World, out: Path, **changes: object) -> list[str]:
    """The command of a run, the same for every start of it."""
    return ["--deepspeed", str(ZERO3), *world.arguments(out, **(OPTIONS | changes))]


def be_rank(command: list[str], inside: dict[str, Any] | None) -> None:
    """Process of a rank: inject its fault, if any, and run the real script."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # for `Start.wait`: where it hangs
    if inside is not None:
        inject_in_process.install(**inside)
    fork_server.script(str(TRAIN), command)


class Start:
    """One start of the job: its ranks' processes. As a context, nothing of it outlives the block.

    Args:
        out: folder of the run; every rank's log lies beside it, of all starts in one.
        command: of `arguments`.
        inside: by rank, arguments of `inject_in_process.install`: a fault that a rank does to itself.
    """

    def __init__(self, out: Path, command: list[str], inside: dict[int, dict[str, Any]] | None = None) -> None:
        from w2r2_ds.training.deepspeed.process_group import free_port

        self.out = out
        self.logs = [out.with_name(f"{out.name}.rank{rank}.log") for rank in range(WORLD_SIZE)]
        self._skip = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self.ended: dict[int, float] = {}  # rank -> time.monotonic() at which it was seen to have ended
        self.fault_at = 0.0
        port = free_port()
        self.processes: list[fork_server.Rank] = []
        for rank, log in enumerate(self.logs):
            given = [command, (inside or {}).get(rank)]
            where = fork_server.place(rank, WORLD_SIZE, port)
            self.processes.append(fork_server.fork_rank(Path(__file__), "be_rank", given, where, log))

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.ended and process.poll() is not None:
                self.ended[rank] = time.monotonic()
        return [rank for rank in range(WORLD_SIZE) if rank not in self.ended]

    def send(self, what: signal.Signals, *ranks: int) -> None:
        """Send a signal to those of some ranks (without any: of all) that still run."""
        self.fault_at = self.fault_at or time.monotonic()
        for rank in set(ranks or range(WORLD_SIZE)) & set(self.running()):
            self.processes[rank].send(what)

    def until(self, seen: Callable[[], bool], pause: float = 0.02) -> bool:
        """Poll until something is seen; False if a rank ended before.

        Raises:
            AssertionError: neither has come within `RUN_LIMIT` seconds.
        """
        deadline = time.monotonic() + RUN_LIMIT
        while not seen():
            if len(self.running()) < WORLD_SIZE:
                return False
            assert time.monotonic() < deadline, f"not seen in {RUN_LIMIT:.0f} s:\n{self.output()}"
            time.sleep(pause)
        return True

    def wait(self, limit: float = RUN_LIMIT) -> list[int]:
        """Exit codes of all ranks; negative for a signal.

        Raises:
            AssertionError: a rank has not ended within `limit` seconds, or `END_LIMIT` after the first one.
        """
        deadline = time.monotonic() + limit
        while running := self.running():
            now = time.monotonic()
            if now > deadline or (self.ended and now > min(self.ended.values()) + END_LIMIT):
                self.send(signal.SIGUSR2)
                time.sleep(1.0)
                raise AssertionError(f"ranks {running} have not ended:\n{self.output()}")
            time.sleep(0.05)
        return [process.code for process in self.processes]

    def seconds_to_end(self) -> float:
        """From the fault until all ranks had ended; only where there was one."""
        stamps = re.findall(rf"{inject_in_process.MARK} ([\d.]+)", "".join(map(self.text, range(WORLD_SIZE))))
        return max(self.ended.values()) - (float(stamps[0]) if stamps else self.fault_at or min(self.ended.values()))

    def text(self, rank: int) -> str:
        """Output of a rank in this start."""
        if not self.logs[rank].exists():
            return ""
        return self.logs[rank].read_bytes()[self._skip[rank] :].decode(errors="replace")

    def output(self) -> str:
        """The end of what each rank wrote in this start."""
        return "\n".join(f"--- rank {rank}\n{self.text(rank)[-4000:]}" for rank in range(WORLD_SIZE))


def undisturbed(out: Path, command: list[str]) -> None:
    """Start a job, or go on with it, and let it end.

    Raises:
        AssertionError: it does not end well.
    """
    with Start(out, command) as start:
        codes = start.wait()
        assert codes == [0] * WORLD_SIZE, f"{codes}\n{start.output()}"


def steps_logged(out: Path) -> int:
    """Whole lines of metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0
