"""Folders that training writes: room in them, and whether what is written and fsynced comes back."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from w2r2_ds.doctor.result import CheckResult
from w2r2_ds.doctor.timeouts import brief
from w2r2_ds.utils import atomic_io

PROBE = 2**20
"""Bytes that are written."""


def check_folder(name: str, path: Path, needed: int, why: str) -> CheckResult:
    """A folder can be written, and has room.

    Args:
        name: how the user knows it: out, TMPDIR, TORCH_EXTENSIONS_DIR.
        path: of the folder; where it does not exist, the nearest one above it is tried, in which it would be made.
        needed: bytes.
        why: what needs them.
    """
    outcome = CheckResult()
    folder = nearest(path)
    try:
        free = shutil.disk_usage(folder).free
        write_and_read(folder)
    except OSError as error:
        outcome.shown[name] = f"{path} (cannot be written)"
        outcome.wrong.append(
            f"{name}: {folder} cannot be written ({brief(error)}); mend its rights or its file system, or name "
            "another folder."
        )
        return outcome
    outcome.shown[name] = f"{path}, {free / 2**30:.1f} GiB free"
    if free < needed:
        outcome.wrong.append(
            f"{name}: {folder} has {free / 2**30:.1f} GiB free, {why} needs about {needed / 2**30:.1f}; make room, or "
            "name another folder."
        )
    return outcome


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_and_read(folder: Path) -> None:
    """Write a file, fsync it and its folder, read it back, remove it.

    Raises:
        OSError: one of these fails, or what comes back is not what was written.
    """
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    content = os.urandom(PROBE)
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        atomic_io.sync(folder)
        if path.read_bytes() != content:
            raise OSError("what is read is not what was written")
    finally:
        path.unlink(missing_ok=True)


def leave_mark(path: Path, token: str) -> Path:
    """A file for other nodes to look for, in a folder or where it would be made; its caller removes it.

    Raises:
        OSError: it cannot be written.
    """
    mark = nearest(path) / f".doctor-{token}"
    mark.write_text(token)
    return mark


def check_mark(name: str, mark: str, first_host: str, seconds: float) -> CheckResult:
    """Whether this node sees the file that another has just written: one folder for all, as checkpoints need it.

    Args:
        name: of the folder, for the sentence.
        mark: path of the file, as the other node knows it.
        first_host: that node.
        seconds: to wait for it; network file systems may take a moment.
    """
    end = time.monotonic() + seconds
    while not Path(mark).is_file():
        if time.monotonic() > end:
            return CheckResult(
                wrong=[
                    f"{name}: {Path(mark).parent} is not the folder that {first_host} sees under this name; put {name} "
                    "on a file system that all nodes share."
                ]
            )
        time.sleep(0.1)
    return CheckResult()
