"""Two real ranks without a launcher, faults done to them, the same command again until it is done, and what is left.

A rank is a process that runs launchers/train.py as a script, in a session of its own. It is forked by Python's fork
server, which has the heavy packages imported once: a start of both ranks takes seconds, so one test affords many.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_inside
from runs import ROOT, ZERO3, World, environment, read_metrics

WORLD_SIZE = 2
STEPS = 6
START_LIMIT, END_LIMIT = 240.0, 60.0
"""Seconds: for a run from its start to its end, and from a fault until every rank has ended."""
TRAIN = ROOT / "launchers" / "train.py"
TENSORS = "trainable.safetensors"
OPTIONS: dict[str, object] = {
    "model__lora_dropout": 0.1,  # so that the random state matters
    "train__steps": STEPS,
    "train__global_batch": 8,
    "train__micro_batch": 2,  # accumulation over two micro-batches
    "train__save_every": 1,
    "resume": "auto",
}
NOT_EXACT = ("samples_per_s", "tokens_per_s", "step_s", "memory_gib")
"""Times and sizes in a line of metrics; everything else must be equal to the last bit."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["launchers.train"])


@contextlib.contextmanager
def environ(changes: dict[str, str]) -> Iterator[None]:
    """The fork server inherits the environment of its start."""
    saved = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def be_rank(arguments: list[str], variables: dict[str, str], log: Path, inside: dict[str, Any] | None) -> None:
    """What a rank's process does: its own session, its output into `log`, a fault of its own, the real script."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    if inside is not None:
        fault_inside.install(**inside)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


class Start:
    """One start of the job: its ranks' processes.

    Args:
        out: folder of the run; logs lie beside it, one per rank, all starts in one.
        arguments: of launchers/train.py.
        inside: `fault_inside.install`'s arguments by rank, for faults that a rank does to itself.
    """

    def __init__(self, out: Path, arguments: list[str], inside: dict[int, dict[str, Any]] | None = None) -> None:
        from w2r2_ds.engine.deepspeed import free_port

        self.out, self.began = out, time.monotonic()
        port = str(free_port())
        self.logs = [out.parent / f"{out.name}.rank{rank}.log" for rank in range(WORLD_SIZE)]
        self.processes = []
        with environ(environment()):
            for rank, log in enumerate(self.logs):
                variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                given = arguments, variables, log, (inside or {}).get(rank)
                self.processes.append(_context.Process(target=be_rank, args=given))
                self.processes[-1].start()

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives a start: the whole session of each rank is killed."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join(10)

    @property
    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def send(self, what: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(WORLD_SIZE):
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid, what)

    def wait(self, limit: float = START_LIMIT) -> list[int]:
        """Exit codes of all ranks; negative for a signal.

        Raises:
            AssertionError: a rank has not ended within `limit` seconds.
        """
        until = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        assert not self.alive, f"ranks {self.alive} have not ended in {limit:.0f} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def until(self, seen: Callable[[], bool], pause: float = 0.02, limit: float = START_LIMIT) -> bool:
        """Poll until something is seen; False if the ranks ended before.

        Raises:
            AssertionError: neither has come within `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while not seen():
            if len(self.alive) < WORLD_SIZE:
                return False
            assert time.monotonic() < deadline, f"not seen in {limit:.0f} s:\n{self.output()}"
            time.sleep(pause)
        return True

    def output(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(self.logs))


def arguments(world: World, out: Path, **changes: object) -> list[str]:
    """The command of a run, the same for every start of it."""
    return ["--deepspeed", str(ZERO3), *world.arguments(out, **(OPTIONS | changes))]


def undisturbed(world: World, out: Path, **changes: object) -> Path:
    """A run to which nothing happens."""
    with Start(out, arguments(world, out, **changes)) as start:
        codes = start.wait()
        assert codes == [0, 0], f"{codes}\n{start.output()}"
    return out


def steps_logged(out: Path) -> int:
    """Whole lines of metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0
