"""The lock of an output folder, with real processes; a killed process does not block."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.utils.files.file_lock import locked

HOLD = """
import sys, time, os
from pathlib import Path
from w2r2_ds.utils.files.file_lock import locked
with locked(Path(sys.argv[1]), "out is being prepared", "use another --out"):
    child = os.fork() if sys.argv[2] == "fork" else 1
    os.write(1, b"%d\\n" % child)  # at once: parent and child share the pipe
    time.sleep(120)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Any]:
    """Function that starts another process with the lock: returns it and the id of its forked child."""
    processes, children = [], []

    def start(how: str = "single") -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out.lock"), how]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        child = max(int(processes[-1].stdout.readline()), int((how == "fork" and processes[-1].stdout.readline()) or 0))
        children.extend([child] if how == "fork" else [])
        return processes[-1], child

    yield start
    for number in children:  # first: they hold the pipe open
        os.kill(number, 9)
    for each in processes:
        each.kill()
        each.communicate()


def take(file: Path) -> Any:
    return locked(file, "out is being prepared", "use another --out")


def test_a_second_holder_is_rejected(tmp_path: Path, hold: Any) -> None:
    process, _ = hold()
    with (
        pytest.raises(
            ValueError, match=rf"out is being prepared by process {process.pid} on .* since 20.*; wait until"
        ),
        take(tmp_path / "out.lock"),
    ):
        raise AssertionError("two holders")


def test_a_killed_holder_does_not_block(tmp_path: Path, hold: Any) -> None:
    process, _ = hold()
    process.kill()
    process.wait()
    assert (tmp_path / "out.lock").is_file(), "left by the killed process"
    with take(tmp_path / "out.lock"):
        pass
    assert not (tmp_path / "out.lock").exists()


def test_dataloader_workers_of_a_killed_holder_do_not_block(tmp_path: Path, hold: Any) -> None:
    """A forked DataLoader worker has the parent's open files and outlives a killed parent."""
    process, child = hold("fork")
    process.kill()
    process.wait()
    os.kill(child, 0)
    with take(tmp_path / "out.lock"):
        pass


def test_the_lock_is_released_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.lock"
    for _ in range(2):
        with pytest.raises(KeyError), take(file):
            raise KeyError
    with take(file), pytest.raises(ValueError, match=rf"by process {os.getpid()} on"), take(file):
        pass
    assert not file.exists()


def test_the_content_of_the_lock_file_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "out.lock"
    file.write_text('{"pid": 1, "host": "\\u001b[31m", "since": "x"}')
    with take(file), pytest.raises(ValueError, match="is being prepared by process"), take(file):
        pass


def test_a_file_removed_between_opening_and_locking_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder may end and remove the file meanwhile; a lock on a removed file excludes no other process."""
    import fcntl

    file, real, times = tmp_path / "out.lock", fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        times.append(descriptor)
        if len(times) == 1:
            file.unlink()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.flock", flock)
    with take(file):
        assert len(times) == 2 and file.exists()
        monkeypatch.undo()
        with pytest.raises(ValueError, match="is being prepared by process"), take(file):
            pass


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "out.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), take(tmp_path / "out.lock"):
        pass
    assert (tmp_path / "mine").read_text() == "keep"


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with take(tmp_path / "out.lock"):
        assert f"{tmp_path / 'out.lock'}: this file system has no locks" in caplog.text
