"""A disk that is full while a run saves checkpoints, and has space again later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_runs import FAILED, LOST, Launch, arguments, steps_logged
from runs import World
from scenario import Fault, assert_equals_reference, newest_step, record_rows, run_with_faults

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

SIZE = 24 << 20
"""Bytes of the file system. A checkpoint has 2.7 MB; at most three exist at a time."""
FREE = 1 << 20
"""Bytes left free: too few for a checkpoint, enough for metrics."""
FILLER = "filler"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty run folder on a tmpfs of `SIZE` bytes; logs are written beside it, to another disk."""
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


def fill(folder: Path, free: int) -> None:
    """Fill the disk up to `free` bytes."""
    with open(folder / FILLER, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass  # ENOSPC: the disk is full
        os.truncate(file.fileno(), os.fstat(file.fileno()).st_size - free)


def free_space(folder: Path) -> None:
    """Delete the filler file."""
    (folder / FILLER).unlink(missing_ok=True)


def filled_for(steps: int, free: int) -> Callable[[Launch], bool]:
    """Fill the disk after the second checkpoint and free it `steps` steps later (0: not at all)."""

    def inject(launch: Launch) -> bool:
        if not launch.wait_until(lambda: newest_step(launch.out) >= 2 and steps_logged(launch.out) >= 2):
            return False
        fill(launch.out, free)
        filled = steps_logged(launch.out)
        if steps and not launch.wait_until(lambda: steps_logged(launch.out) >= filled + steps):
            return False
        if steps:
            free_space(launch.out)
        return True

    return inject


def test_a_full_disk_fails_the_save_and_the_run_continues(
    world: World, reference_run: Path, small_disk: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two saves fail, the run continues, and its last checkpoints equal the reference run's."""
    fault = Fault("disk full for two saves", (0,), filled_for(2, FREE), logged=("No space left on device",))
    rows = run_with_faults(small_disk, arguments(world, small_disk), [fault])
    assert_equals_reference(small_disk, reference_run)
    record_rows(record_property, rows)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "free"), [("disk full to the end", FREE), ("disk full to the last byte", 0)])
def test_a_run_on_a_full_disk_resumes_from_the_last_checkpoint(
    world: World,
    reference_run: Path,
    small_disk: Path,
    name: str,
    free: int,
    record_property: Callable[[str, object], None],
) -> None:
    """The run fails; with free space, the same command resumes from the last complete checkpoint."""

    def fill_until_end(launch: Launch) -> bool:
        filled = filled_for(0, free)(launch)
        launch.wait()
        assert newest_step(small_disk) >= 2, "the old checkpoint is gone"
        free_space(small_disk)
        return filled

    fault = Fault(name, (FAILED, LOST), fill_until_end, logged=("No space left on device",))
    rows = run_with_faults(small_disk, arguments(world, small_disk), [fault])
    assert_equals_reference(small_disk, reference_run)
    record_rows(record_property, rows)
