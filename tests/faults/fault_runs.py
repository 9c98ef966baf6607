"""One launch of a training job on two ranks, to inject faults into: its processes, logs and exit codes.

Each rank is a process that runs launchers/train.py as a script, in its own session. It is forked from a server that
has imported the heavy packages (tests/helpers/fork_server.py), so a launch takes only a few seconds.
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
"""Seconds: limit of a whole launch, and limit from the end of the first rank to the end of the last."""
FAILED, LOST, REQUEUE, TERMINATED, KILLED = 1, 75, 85, 143, -int(signal.SIGKILL)
"""Exit codes of a rank (w2r2_ds/training/fault_tolerance/exit_codes.py); the last is SIGKILL's."""
TRAIN = ROOT / "launchers" / "train.py"
OPTIONS: dict[str, object] = {
    "model__lora_dropout": 0.1,  # so that the result depends on the random state
    "data__workers": 1,  # the DataLoader worker of a killed rank must end without a signal
    "train__steps": STEPS,
    "train__global_batch": 4,
    "train__micro_batch": 1,  # two micro-batches per rank and optimizer step
    "train__save_every": 1,
    "resume": "auto",
}


def arguments(world: World, out: Path, **changes: object) -> list[str]:
    """Arguments of launchers/train.py, the same for every launch of a run."""
    return ["--deepspeed", str(ZERO3), *world.arguments(out, **(OPTIONS | changes))]


def rank_main(command: list[str], fault: dict[str, Any] | None) -> None:
    """Entry point of a rank: install its fault, if any, and run launchers/train.py."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # `Launch.wait` asks a hanging rank for its stack
    if fault is not None:
        inject_in_process.install(**fault)
    fork_server.script(str(TRAIN), command)


class Launch:
    """The rank processes of one launch of the job. A context manager that kills them on exit.

    Args:
        out: run folder. The log of each rank is beside it and is appended to by every launch.
        command: result of `arguments`.
        in_process: rank -> arguments of `inject_in_process.install`.
    """

    def __init__(self, out: Path, command: list[str], in_process: dict[int, dict[str, Any]] | None = None) -> None:
        from w2r2_ds.training.deepspeed.process_group import free_port

        self.out = out
        self.logs = [out.with_name(f"{out.name}.rank{rank}.log") for rank in range(WORLD_SIZE)]
        self._skip = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self.ended: dict[int, float] = {}  # rank -> time.monotonic() of the poll that found it ended
        self.fault_at = 0.0
        port = free_port()
        self.processes: list[fork_server.Rank] = []
        for rank, log in enumerate(self.logs):
            function_arguments = [command, (in_process or {}).get(rank)]
            variables = fork_server.rank_variables(rank, WORLD_SIZE, port)
            self.processes.append(
                fork_server.fork_rank(Path(__file__), "rank_main", function_arguments, variables, log)
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()

    def running(self) -> list[int]:
        """Ranks that have not ended; also records when the others ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.ended and process.poll() is not None:
                self.ended[rank] = time.monotonic()
        return [rank for rank in range(WORLD_SIZE) if rank not in self.ended]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to the given ranks (default: all) that are still running."""
        self.fault_at = self.fault_at or time.monotonic()
        for rank in set(ranks or range(WORLD_SIZE)) & set(self.running()):
            self.processes[rank].send(number)

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.02) -> bool:
        """Poll until the condition holds; False if a rank ended first.

        Raises:
            AssertionError: neither happened within `RUN_LIMIT` seconds.
        """
        deadline = time.monotonic() + RUN_LIMIT
        while not condition():
            if len(self.running()) < WORLD_SIZE:
                return False
            assert time.monotonic() < deadline, f"condition not met in {RUN_LIMIT:.0f} s:\n{self.output()}"
            time.sleep(pause)
        return True

    def wait(self, limit: float = RUN_LIMIT) -> list[int]:
        """Wait for all ranks; returns their exit codes, -N for a rank killed by signal N.

        Raises:
            AssertionError: a rank has not ended within `limit` seconds, or `END_LIMIT` after the first one.
        """
        deadline = time.monotonic() + limit
        while running := self.running():
            now = time.monotonic()
            if now > deadline or (self.ended and now > min(self.ended.values()) + END_LIMIT):
                self.send(signal.SIGUSR2)  # `faulthandler` writes the stacks to the log
                time.sleep(1.0)
                raise AssertionError(f"ranks {running} have not ended:\n{self.output()}")
            time.sleep(0.05)
        return [process.code for process in self.processes]

    def seconds_to_end(self) -> float:
        """Seconds from the fault (without one: from the end of the first rank) to the end of the last rank."""
        stamps = re.findall(rf"{inject_in_process.MARK} ([\d.]+)", "".join(map(self.text, range(WORLD_SIZE))))
        return max(self.ended.values()) - (float(stamps[0]) if stamps else self.fault_at or min(self.ended.values()))

    def text(self, rank: int) -> str:
        """Output of a rank in this launch."""
        if not self.logs[rank].exists():
            return ""
        return self.logs[rank].read_bytes()[self._skip[rank] :].decode(errors="replace")

    def output(self) -> str:
        """The last 4000 characters of each rank's output in this launch."""
        return "\n".join(f"--- rank {rank}\n{self.text(rank)[-4000:]}" for rank in range(WORLD_SIZE))


def run_to_end(out: Path, command: list[str]) -> None:
    """Launch or resume a run without faults and wait for its end.

    Raises:
        AssertionError: a rank's exit code is not 0.
    """
    with Launch(out, command) as launch:
        codes = launch.wait()
        assert codes == [0] * WORLD_SIZE, f"{codes}\n{launch.output()}"


def steps_logged(out: Path) -> int:
    """Number of complete lines in metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0
