"""A small file system that fills up while a run saves, and is freed again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_runs import FAILED, LOST, Start, arguments, steps_logged
from runs import World
from scenario import Fault, assert_as_undisturbed, newest_step, note, suffer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

SIZE = 24 << 20
"""Bytes of the file system; a checkpoint has 2.7 MB, and three are there at a time."""
ROOM = 1 << 20
"""Bytes left: too few for a checkpoint, enough for the lines of metrics."""
BALLAST = "ballast"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a small tmpfs; other files of a test are beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, room: int) -> None:
    """Leave `room` bytes."""
    with open(folder / BALLAST, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass  # full, which is what was wanted
        os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - room)


def free(folder: Path) -> None:
    """As someone who cleans up."""
    (folder / BALLAST).unlink(missing_ok=True)


def filled_for(steps: int, room: int) -> Callable[[Start], bool]:
    """Fill the disk after the second checkpoint; free it `steps` later, where not 0."""

    def act(start: Start) -> bool:
        if not start.until(lambda: newest_step(start.out) >= 2 and steps_logged(start.out) >= 2):
            return False
        fill(start.out, room)
        filled = steps_logged(start.out)
        if steps and not start.until(lambda: steps_logged(start.out) >= filled + steps):
            return False
        if steps:
            free(start.out)
        return True

    return act


def test_a_full_disk_fails_saves_but_not_the_run(
    world: World, calm: Path, small: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two saves fail, the run goes on and ends with the last checkpoints as if nothing had been."""
    fault = Fault("disk full for two saves", (0,), filled_for(2, ROOM), logged=("No space left on device",))
    rows = suffer(small, arguments(world, small), [fault])
    assert_as_undisturbed(small, calm)
    note(record_property, rows)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "room"), [("disk full to the end", ROOM), ("disk full to the last byte", 0)])
def test_a_disk_that_stays_full_costs_the_steps_since_the_last_checkpoint(
    world: World, calm: Path, small: Path, name: str, room: int, record_property: Callable[[str, object], None]
) -> None:
    """The run ends with an error; once there is room the same command goes on from the checkpoint of before."""
    fault = Fault(name, (FAILED, LOST), filled_for(0, room), logged=("No space left on device",))

    def ended(start: Start) -> bool:
        happened = fault.act(start)
        start.wait()
        assert newest_step(small) >= 2, "the old checkpoint is gone"
        free(small)
        return happened

    rows = suffer(small, arguments(world, small), [Fault(name, fault.codes, ended, logged=fault.logged)])
    assert_as_undisturbed(small, calm)
    note(record_property, rows)
