"""Rank processes without a launcher, so that a test can signal each rank and read its exit code."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import fork_server
from w2r2_ds.training.deepspeed.process_group import free_port


class Ranks:
    """The rank processes of one run, from the fork server. A context manager that kills them on exit.

    Args:
        count: number of ranks.
        command: script and its arguments.
        folder: gets ``rank-N.log`` with standard output and error of each rank.
    """

    def __init__(self, count: int, command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        port, arguments = free_port(), [command[0], command[1:]]
        self.processes = [
            fork_server.fork_rank(
                Path(fork_server.__file__), "script", arguments, fork_server.rank_variables(rank, count, port), log
            )
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()

    def output(self, rank: int) -> str:
        """Output of a rank so far."""
        return self.logs[rank].read_text(errors="replace")

    def send(self, rank: int, signal: int) -> None:
        """Send a signal to a rank."""
        self.processes[rank].send(signal)

    def codes(self, timeout: float) -> list[int | None]:
        """Wait for all ranks; returns their exit codes, -N for a rank killed by signal N.

        Raises:
            AssertionError: a rank is still running after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                output = "\n".join(f"rank {rank}:\n{self.output(rank)[-3000:]}" for rank in range(len(self.logs)))
                raise AssertionError(f"still running after {timeout} s:\n{output}")
            time.sleep(fork_server.POLL)
        return [process.code for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Wait until a condition holds while all ranks run.

        Raises:
            AssertionError: a rank has ended, or `timeout` seconds are over.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, f"rank {ended[0]} has ended:\n{self.output(ended[0])[-4000:]}"
            assert time.monotonic() < deadline, f"condition not met in {timeout} s:\n{self.output(0)[-4000:]}"
            time.sleep(fork_server.POLL)
