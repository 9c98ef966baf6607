"""Atomic writes: after a crash or on a full disk, files are complete or unchanged."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from w2r2_ds.utils.files import atomic_io

KILLED_WHILE_REPLACING = """
import sys
from pathlib import Path
from w2r2_ds.utils.files import atomic_io
file = Path(sys.argv[1])
number = 0
while True:
    number += 1
    atomic_io.replace(file, str(number) * 100_000)
    print(number, flush=True)
"""


class Full(io.RawIOBase):
    """File on a disk with a limited number of free bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.kept = room, b""

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if len(view) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(view)
        self.kept += bytes(view)
        return len(view)


def test_written_bytes_are_counted_and_hashed(tmp_path: Path) -> None:
    with atomic_io.writing(tmp_path / "a") as writer:
        writer.write(b"one")
        writer.write(memoryview(b"two"))
    expected = atomic_io.Digest(6, hashlib.sha256(b"onetwo").hexdigest())
    assert writer.digest == expected == atomic_io.digest(tmp_path / "a")
    assert atomic_io.replace(tmp_path / "a", "größer") == atomic_io.digest(tmp_path / "a")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "größer"
    assert os.listdir(tmp_path) == ["a"]


def test_torch_save_writes_through_the_writer(tmp_path: Path) -> None:
    state = {"weight": torch.arange(1000.0), "step": 3}
    with atomic_io.writing(tmp_path / "a.pt") as writer:
        torch.save(state, writer)
    assert writer.digest == atomic_io.digest(tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(loaded["weight"], state["weight"]) and loaded["step"] == 3


@pytest.mark.parametrize("room", [0, 10, 3000])
def test_a_full_disk_is_recorded_by_the_writer_not_by_torch(room: int) -> None:
    """An exception inside `torch.save` would become a RuntimeError of its archive, or abort the process."""
    writer = atomic_io.Writer(Full(room))
    torch.save({"weight": torch.arange(10_000.0)}, writer)
    assert writer.error is not None and writer.error.errno == errno.ENOSPC


def test_a_file_that_is_too_large_raises_with_its_name(tmp_path: Path) -> None:
    """EFBIG, which fails like a full disk: no file is replaced, and no temporary file remains."""
    atomic_io.replace(tmp_path / "a", "old")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError) as caught:
            atomic_io.replace(tmp_path / "a", "new" * 1000)
        with pytest.raises(OSError) as saving, atomic_io.writing(tmp_path / "b") as writer:
            torch.save(torch.arange(1000.0), writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.errno == errno.EFBIG and "a." in str(caught.value.filename)
    assert saving.value.errno == errno.EFBIG and saving.value.filename == str(tmp_path / "b")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # b is inside a folder that is itself temporary


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_io.replace(tmp_path / "a", "old")
    with pytest.raises(KeyError), atomic_io.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_killed_writer_leaves_a_complete_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for pause in (0.0, 0.003, 0.011):
        writer = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_REPLACING, str(file)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"1\n"
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        text = file.read_text()
        number = text[: len(text) // 100_000]
        assert number and text == number * 100_000


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        atomic_io.move(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "file").read_text() == "two"
    atomic_io.move(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three" / "file").read_text() == "one"
