"""SHA-256 of files and JSON values, and versions of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FileVersion = tuple[int, int, int, int, int]
"""Device, inode, size, modification time and change time of a file; see `file_version`."""


def file_version(path: Path) -> FileVersion:
    """Version of a file, which changes when the file is written or replaced. Raises OSError if it does not exist.

    A hash of the content is computed once per version.
    """
    status = os.stat(path)
    # The modification time can be set back (rsync and tar do); the change time (ctime) cannot.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path], root: Path) -> str:
    """Hexadecimal SHA-256 over the contents of several files and their paths relative to `root`, in sorted order."""
    return named_sha256({str(path.relative_to(root)): file_sha256(path) for path in paths})


def named_sha256(digests: Mapping[str, str]) -> str:
    """The result of `files_sha256` for files whose SHA-256 is known: path relative to `root` -> SHA-256."""
    lines = (f"{name}\0{digests[name]}\n" for name in sorted(digests, key=Path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def json_sha256(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
