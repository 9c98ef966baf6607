"""Data files that become unreadable during a run, as on a network file system, and are readable again later."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import FAILED, KILLED, Launch, arguments, steps_logged
from inject_from_outside import cut
from runs import World
from scenario import Fault, assert_equals_reference, newest_step, record_rows, run_with_faults

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    """A copy of the scenes, which the test may damage. Losses do not depend on the data folder."""
    return Path(shutil.copytree(world.folder / "scenes", tmp_path / "scenes"))


def unreadable(files: list[Path], run: Callable[[Launch], bool]) -> Callable[[Launch], bool]:
    """Truncate files once a step is logged, call `run`, which must wait for the ranks, and restore the files."""

    def inject(launch: Launch) -> bool:
        before = steps_logged(launch.out)
        if not launch.wait_until(lambda: steps_logged(launch.out) > before):
            return False
        originals = {file: file.read_bytes() for file in files}
        for file, content in originals.items():
            file.write_bytes(cut(content))
        try:
            return run(launch)
        finally:
            for file, content in originals.items():
                file.write_bytes(content)

    return inject


def wait_for_end(launch: Launch) -> bool:
    """Wait for the ranks, which must fail without a signal."""
    launch.wait()
    return True


def test_a_run_resumes_after_unreadable_frames(
    world: World, reference_run: Path, root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """All ranks fail when the first frame is loaded, with its path in the error; later the run resumes."""
    out, frames = tmp_path / "run", sorted(root.glob("posed_images/*/*.jpg"))
    assert frames
    fault = Fault("frame unreadable in the run", (FAILED,), unreadable(frames, wait_for_end), logged=("posed_images",))
    rows = run_with_faults(out, arguments(world, out, data__root=root, data__workers=0), [fault, fault])
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)


def test_a_run_resumes_after_an_unreadable_prepared_file(
    world: World, reference_run: Path, root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A restart fails with the file's name and changes no checkpoint; it resumes when the file is readable again."""
    out, file = tmp_path / "run", next((root / "prepared" / "scanrefer" / "train").glob("*.parquet"))
    command = arguments(world, out, data__root=root)

    def kill_and_restart(launch: Launch) -> bool:
        launch.send(signal.SIGKILL)
        launch.wait()
        step = newest_step(out)
        with Launch(out, command) as second:
            assert second.wait() == [FAILED, FAILED], second.output()
            assert file.name in second.text(0), second.output()
        assert newest_step(out) == step
        return True

    inject = unreadable([file], kill_and_restart)
    rows = run_with_faults(out, command, [Fault("prepared file unreadable at a restart", (KILLED,), inject)])
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)
