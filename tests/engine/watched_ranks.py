"""What each rank of tests/engine/test_watchdog.py runs: steps of a small model under the watchdog, then a mishap.

``python watched_ranks.py MISHAP RANK [STEP]``: in that step, from 1, the rank does what `MISHAPS` says. A step is a
forward of the model and an all-reduce.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from w2r2_ds.engine.judge import Limits
from w2r2_ds.engine.watchdog import Watchdog

LIMITS = Limits(hang=4, gone=6, beat=0.3, settle=2)


def sleep() -> None:
    time.sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mistake() -> None:
    raise ValueError("frame 7 of scene0001_00 cannot be read; replace the file.")


def failure() -> None:
    raise RuntimeError("out of memory")


MISHAPS = {each.__name__: each for each in (sleep, stop, die, mistake, failure)}


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


def main(mishap: str, who: int, when: int) -> None:
    """Three steps."""
    dist.init_process_group("gloo")
    model = Tower()
    with Watchdog(LIMITS) as watchdog:
        watchdog.activity.follow("model", model)
        watchdog.loop()
        for step in range(1, 4):
            watchdog.activity.at("forward", step)
            if who in (dist.get_rank(), -1) and step == when:
                model.layers[1].mishap = MISHAPS[mishap]  # type: ignore[assignment]
            model(torch.ones(1, 2))
            dist.all_reduce(torch.ones(1))
    print("through", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    name, rank, *step = sys.argv[1:]
    try:
        main(name, int(rank), int(step[0]) if step else 2)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
