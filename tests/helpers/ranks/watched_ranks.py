"""Rank script of tests/training/fault_tolerance/test_watchdog.py: ranks that train under the watchdog, with a fault.

``python watched_ranks.py FOLDER`` runs all `CASES` at once. Each rank is a process, forked after all imports. Writes
``FOLDER/CASE.RANK.log`` with the rank's output and ``FOLDER/codes.json`` with the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.training.fault_tolerance.hang_detector import Limits
from w2r2_ds.training.fault_tolerance.watchdog import MISTAKES, Watchdog

LIMITS = Limits(hang=4, gone=6, beat=0.3, settle=2)


def sleep() -> None:
    """Hang."""
    time.sleep(600)


def stop() -> None:
    """Stop the process, as a suspended node does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    """Kill the process, as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def mistake() -> None:
    """Raise an error that the user can mend."""
    raise ValueError("frame 7 of scene0001_00 cannot be read; replace the file.")


def memory() -> None:
    """Raise PyTorch's out-of-memory error."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


def failure() -> None:
    """Raise an error of the machine or of a library."""
    raise RuntimeError("no such kernel")


FAULTS = {function.__name__: function for function in (sleep, stop, die, mistake, memory, failure)}
EVERY, NEVER = -1, -2
CASES: dict[str, tuple[int, str, int]] = {
    "hang": (3, "sleep", 1),
    "hang-alone": (1, "sleep", 0),
    "die": (3, "die", 1),
    "stop": (3, "stop", 1),
    "die-0": (2, "die", 0),
    "stop-0": (2, "stop", 0),
    "mistake": (2, "mistake", 1),
    "mistake-0": (2, "mistake", 0),
    "mistake-of-all": (2, "mistake", EVERY),
    "memory": (2, "memory", 1),
    "failure": (2, "failure", 1),
    "none": (2, "sleep", NEVER),
}
"""Case -> number of ranks, fault, and the rank that has it in its second step."""
TIMEOUT = 90
"""Seconds after which running processes are killed; their exit code is then -9."""


class Block(nn.Module):
    """A block that calls `fault` in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.fault = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fault()
        return self.inner(x)


class Tower(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def rank_main(fault: str, faulty_rank: int) -> None:
    """Train three steps; `faulty_rank` has the fault in step 2."""
    dist.init_process_group("gloo")
    model = Tower()
    with Watchdog(LIMITS) as watchdog:
        watchdog.activity.follow("model", model)
        watchdog.start_hang_detection()
        for step in range(1, 4):
            watchdog.activity.set_phase("forward", step)
            if faulty_rank in (dist.get_rank(), EVERY) and step == 2:
                model.layers[1].fault = FAULTS[fault]  # type: ignore[assignment]
            model(torch.ones(1, 2))
            dist.all_reduce(torch.ones(1))
    print("through", flush=True)
    dist.destroy_process_group()


def child(log: Path, environment: dict[str, str], fault: str, faulty_rank: int) -> None:
    """Entry point of a forked rank; does not return."""
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 99
    try:
        rank_main(fault, faulty_rank)
        code = 0
    except MISTAKES as error:  # as launchers/train.py does
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(folder: Path) -> None:
    """Run all cases. A process that has stopped itself is killed after the other ranks of its case have ended."""
    running: dict[int, tuple[str, int]] = {}
    for case, (world, fault, faulty_rank) in CASES.items():
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for number in range(world):
            pid = os.fork()
            if pid == 0:
                child(folder / f"{case}.{number}.log", variables | {"RANK": str(number)}, fault, faulty_rank)
            running[pid] = case, number
    codes: dict[str, list[int | None]] = {case: [None] * world for case, (world, *_) in CASES.items()}
    deadline = time.monotonic() + TIMEOUT
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            case, number = running.pop(pid)
            codes[case][number] = os.waitstatus_to_exitcode(status)
        for pid, (case, number) in running.items():
            other_codes = [code for other, code in enumerate(codes[case]) if other != number]
            stopped = CASES[case][1:] == ("stop", number) and None not in other_codes
            if stopped or time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
