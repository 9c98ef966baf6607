"""Faults injected from outside: signals, and damaged files while ranks run or between two starts."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fault_runs import KILLED, LOST, Start, steps_logged
from scenario import Fault, newest_step
from w2r2_ds.training.checkpoint.manifest import PARTIAL, newest_complete

LONGEST = 0.6
"""Seconds after a save's first file until the kill, at most; a save takes 0.3 s on an idle machine, so that some kills
fall between its rename and its end, and some behind."""
VICTIMS = ((0,), (1,), (0, 1))
"""Both: a node without power."""


def in_a_save(draw: random.Random, patience: float = 0.0) -> Fault:
    """SIGKILL to rank 0, to rank 1 or to both at a random moment of the next save.

    With `patience`, a rank that is left gets it so many seconds later, as from a launcher; else it ends by itself.
    """
    delay, ranks = draw.uniform(0, LONGEST), draw.choice(VICTIMS)

    def act(start: Start) -> bool:
        folder = start.out / "checkpoints"
        left = set(folder.glob(f"step-*{PARTIAL}*"))  # by the start before
        if not start.until(lambda: bool(set(folder.glob(f"step-*{PARTIAL}*")) - left), pause=0.002):
            return False
        time.sleep(delay)
        start.send(signal.SIGKILL, *ranks)
        if patience:
            time.sleep(patience)
            start.send(signal.SIGKILL)
        return True

    def when(out: Path) -> str:
        return ", half written" if list((out / "checkpoints").glob(f"step-*{PARTIAL}*")) else ", renamed already"

    return Fault("kill -9 during a save", (KILLED, LOST), act, when=when, late=True)


def storm(number: signal.Signals, code: int, name: str, seen: Callable[[Start], bool] | None = None) -> Fault:
    """A signal to every rank every few milliseconds, from the first step that this start logs (or `seen`) on."""

    def act(start: Start) -> bool:
        before = steps_logged(start.out)
        if not start.until(lambda: seen(start) if seen else steps_logged(start.out) > before):
            return False
        while start.running():
            start.send(number)
            time.sleep(0.005)
        return True

    return Fault(name, (code,), act)


def kill_after(steps: int) -> Callable[[Start], bool]:
    """SIGKILL to all ranks when so many steps are saved beyond the newest whole checkpoint of before."""

    def act(start: Start) -> bool:
        file = start.out / "checkpoints" / "latest"

        def saved() -> int:
            return int(file.read_text().strip().removeprefix("step-")) if file.exists() else 0

        before = newest_step(start.out)
        if not start.until(lambda: saved() >= before + steps):
            return False
        start.send(signal.SIGKILL)
        return True

    return act


def damage(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of the first file of the newest checkpoint that fits a pattern."""

    def before(out: Path) -> None:
        path, _ = newest_complete(out)
        assert path is not None
        file = sorted(path.glob(pattern))[0]
        file.write_bytes(change(file.read_bytes()))

    return before


def flip_a_bit(data: bytes) -> bytes:
    """In the middle, as a bad disk or cable does it."""
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def cut(data: bytes) -> bytes:
    """The second half was never written."""
    return data[: len(data) // 2]
