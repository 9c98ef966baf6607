"""Fault injection from outside the ranks: signals, and damaged checkpoint files between two launches."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fault_runs import KILLED, LOST, Launch, steps_logged
from scenario import Fault, newest_step
from w2r2_ds.training.checkpoint.manifest import PARTIAL, newest_complete

MAX_DELAY = 0.6
"""Upper bound of the seconds from a save's first file to the kill. A save takes 0.3 s on an idle machine, so some kills
come before its rename, some after it and some after the save."""
VICTIMS = ((0,), (1,), (0, 1))
"""Ranks to kill; both at once is a power failure of the node."""


def kill_during_save(draw: random.Random, kill_rest_after: float = 0.0) -> Fault:
    """SIGKILL to rank 0, to rank 1 or to both at a random time of the next save.

    With `kill_rest_after`, the other rank is killed that many seconds later, as a launcher does. Otherwise its watchdog
    ends it.
    """
    delay, ranks = draw.uniform(0, MAX_DELAY), draw.choice(VICTIMS)

    def inject(launch: Launch) -> bool:
        folder = launch.out / "checkpoints"
        old = set(folder.glob(f"step-*{PARTIAL}*"))  # partial saves of earlier launches
        if not launch.wait_until(lambda: bool(set(folder.glob(f"step-*{PARTIAL}*")) - old), pause=0.002):
            return False
        time.sleep(delay)
        launch.send(signal.SIGKILL, *ranks)
        if kill_rest_after:
            time.sleep(kill_rest_after)
            launch.send(signal.SIGKILL)
        return True

    def name_suffix(out: Path) -> str:
        return ", half written" if list((out / "checkpoints").glob(f"step-*{PARTIAL}*")) else ", renamed already"

    return Fault("kill -9 during a save", (KILLED, LOST), inject, name_suffix=name_suffix, may_miss=True)


def signal_storm(number: signal.Signals, code: int, name: str, begin: Callable[[Launch], bool] | None = None) -> Fault:
    """Send a signal to every rank every 5 ms, from the first step that this launch logs (or from `begin`) on."""

    def inject(launch: Launch) -> bool:
        before = steps_logged(launch.out)
        if not launch.wait_until(lambda: begin(launch) if begin else steps_logged(launch.out) > before):
            return False
        while launch.running():
            launch.send(number)
            time.sleep(0.005)
        return True

    return Fault(name, (code,), inject)


def kill_after(steps: int) -> Callable[[Launch], bool]:
    """SIGKILL to all ranks once the launch has saved `steps` steps beyond the newest complete checkpoint."""

    def inject(launch: Launch) -> bool:
        file = launch.out / "checkpoints" / "latest"

        def saved() -> int:
            return int(file.read_text().strip().removeprefix("step-")) if file.exists() else 0

        before = newest_step(launch.out)
        if not launch.wait_until(lambda: saved() >= before + steps):
            return False
        launch.send(signal.SIGKILL)
        return True

    return inject


def damage(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of a file of the newest checkpoint, the first that matches the glob pattern."""

    def before(out: Path) -> None:
        path, _ = newest_complete(out)
        assert path is not None
        file = sorted(path.glob(pattern))[0]
        file.write_bytes(change(file.read_bytes()))

    return before


def flip_a_bit(data: bytes) -> bytes:
    """Flip one bit in the middle, as a faulty disk or cable does."""
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def cut(data: bytes) -> bytes:
    """Drop the second half, as an interrupted write does."""
    return data[: len(data) // 2]
