"""Ranks as processes without a launcher, so that a test can signal each one and read its exit code."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import fork_server
from w2r2_ds.training.deepspeed.process_group import free_port


class Ranks:
    """The processes of one run, forked with everything imported.

    Args:
        count: of ranks.
        command: script and arguments.
        folder: for the output of each rank, both streams together, in ``rank-N.log``.
    """

    def __init__(self, count: int, command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        port, given = free_port(), [command[0], command[1:]]
        self.processes = [
            fork_server.fork_rank(
                Path(fork_server.__file__), "script", given, fork_server.rank_variables(rank, count, port), log
            )
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()

    def said(self, rank: int) -> str:
        """Output of a rank so far."""
        return self.logs[rank].read_text(errors="replace")

    def send(self, rank: int, signal: int) -> None:
        """Signal one rank."""
        self.processes[rank].send(signal)

    def codes(self, timeout: float) -> list[int | None]:
        """The exit code of each rank, once all have ended; minus the signal for one that a signal killed."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                said = "\n".join(f"rank {rank}:\n{self.said(rank)[-3000:]}" for rank in range(len(self.logs)))
                raise AssertionError(f"still running after {timeout} s:\n{said}")
            time.sleep(fork_server.POLL)
        return [process.code for process in self.processes]

    def until(self, seen: Callable[[], bool], timeout: float = 300) -> None:
        """Wait for something to be seen while all ranks run."""
        deadline = time.monotonic() + timeout
        while not seen():
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, f"rank {ended[0]} has ended:\n{self.said(ended[0])[-4000:]}"
            assert time.monotonic() < deadline, f"not seen in {timeout} s:\n{self.said(0)[-4000:]}"
            time.sleep(fork_server.POLL)
