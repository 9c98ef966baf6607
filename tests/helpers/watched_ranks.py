"""Rank script of tests/training/fault_tolerance/test_watchdog.py: ranks that step under the watchdog, until one meets a
mishap.

``python watched_ranks.py FOLDER`` runs all `CASES` at once, each rank a process of its own that is forked once
everything is imported; ``FOLDER/CASE.RANK.log`` is what it printed, ``FOLDER/codes.json`` how all ended.
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
    time.sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mistake() -> None:
    raise ValueError("frame 7 of scene0001_00 cannot be read; replace the file.")


def memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def failure() -> None:
    raise RuntimeError("no such kernel")


MISHAPS = {each.__name__: each for each in (sleep, stop, die, mistake, memory, failure)}
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
"""How many ranks; what happens to which of them in its second step."""
PATIENCE = 90
"""Seconds after which what still runs is ended, and told by its exit code."""


class Block(nn.Module):
    """A block that runs a mishap in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.mishap = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mishap()
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


def rank(mishap: str, who: int) -> None:
    """Three steps."""
    dist.init_process_group("gloo")
    model = Tower()
    with Watchdog(LIMITS) as watchdog:
        watchdog.activity.follow("model", model)
        watchdog.start_hang_detection()
        for step in range(1, 4):
            watchdog.activity.at("forward", step)
            if who in (dist.get_rank(), EVERY) and step == 2:
                model.layers[1].mishap = MISHAPS[mishap]  # type: ignore[assignment]
            model(torch.ones(1, 2))
            dist.all_reduce(torch.ones(1))
    print("through", flush=True)
    dist.destroy_process_group()


def child(log: Path, environment: dict[str, str], mishap: str, who: int) -> None:
    """A forked process; never returns."""
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 99
    try:
        rank(mishap, who)
        code = 0
    except MISTAKES as error:  # as launchers/train.py
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(folder: Path) -> None:
    """Run all cases; a process that stopped itself is ended once its companions have."""
    running: dict[int, tuple[str, int]] = {}
    for case, (world, mishap, who) in CASES.items():
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for number in range(world):
            pid = os.fork()
            if pid == 0:
                child(folder / f"{case}.{number}.log", place | {"RANK": str(number)}, mishap, who)
            running[pid] = case, number
    codes: dict[str, list[int | None]] = {case: [None] * world for case, (world, *_) in CASES.items()}
    deadline = time.monotonic() + PATIENCE
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            case, number = running.pop(pid)
            codes[case][number] = os.waitstatus_to_exitcode(status)
        for pid, (case, number) in running.items():
            companions = [code for other, code in enumerate(codes[case]) if other != number]
            stopped = CASES[case][1:] == ("stop", number) and None not in companions
            if stopped or time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
