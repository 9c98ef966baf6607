"""Files of the data that turn unreadable while ranks run, as on a network file system, and come back."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import FAILED, KILLED, Start, arguments, steps_logged
from inject_from_outside import cut
from runs import World
from scenario import Fault, assert_as_undisturbed, newest_step, note, suffer

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    """Scenes of the test's own; a resumed run may find its data elsewhere, and losses do not depend on where."""
    return Path(shutil.copytree(world.folder / "scenes", tmp_path / "scenes"))


def unreadable(files: list[Path], run: Callable[[Start], bool]) -> Callable[[Start], bool]:
    """Cut files once a step is logged, let `run` see to the end of the ranks, and put the files back."""

    def act(start: Start) -> bool:
        before = steps_logged(start.out)
        if not start.until(lambda: steps_logged(start.out) > before):
            return False
        whole = {file: file.read_bytes() for file in files}
        for file, content in whole.items():
            file.write_bytes(cut(content))
        try:
            return run(start)
        finally:
            for file, content in whole.items():
                file.write_bytes(content)

    return act


def ends(start: Start) -> bool:
    """By itself."""
    start.wait()
    return True


def test_frames_that_turn_unreadable(
    world: World, calm: Path, root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Found when the first of them is loaded: all ranks end, its name in the sentence; then the files are back."""
    out, frames = tmp_path / "run", sorted(root.glob("posed_images/*/*.jpg"))
    assert frames
    fault = Fault("frame unreadable in the run", (FAILED,), unreadable(frames, ends), logged=("posed_images",))
    rows = suffer(out, arguments(world, out, data__root=root, data__workers=0), [fault, fault])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)


def test_a_prepared_file_that_turns_unreadable(
    world: World, calm: Path, root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A run has read it; a restart fails with its name, changes no checkpoint, and continues when the file is back."""
    out, file = tmp_path / "run", next((root / "prepared" / "scanrefer" / "train").glob("*.parquet"))
    command = arguments(world, out, data__root=root)

    def killed_and_rejected(start: Start) -> bool:
        start.send(signal.SIGKILL)
        start.wait()
        step = newest_step(out)
        with Start(out, command) as again:
            assert again.wait() == [FAILED, FAILED], again.output()
            assert file.name in again.text(0), again.output()
        assert newest_step(out) == step
        return True

    act = unreadable([file], killed_and_rejected)
    rows = suffer(out, command, [Fault("prepared file unreadable at a restart", (KILLED,), act)])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)
