"""Write files atomically and durably: after a crash or on a full disk, a file has its old or its new content.

Order: write a temporary file beside the target, fsync it, rename it, fsync the folder. Without the last step, a power
failure may undo the rename. Digests are computed from the bytes passed to `write`, not read back from the disk, so that
a later check detects corruption by the disk.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.utils.files.hashing import file_sha256


@dataclass(frozen=True)
class Digest:
    """Size in bytes and SHA-256 in hex of a file's content."""

    bytes: int
    sha256: str


class Writer:
    """Binary file that counts and hashes the bytes written to it; created by `writing`.

    The first OSError is stored, and later writes are dropped: `torch.save` writes from C++, which handles an exception
    by finishing its archive and raises another error instead.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its size in bytes, even after an error."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._bytes += len(view)
        remaining = view
        while len(remaining) and self.error is None:  # an unbuffered file may write only a part of the data
            try:
                remaining = remaining[self._file.write(remaining) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """No-op, called by `torch.save`; the file is unbuffered."""

    @property
    def digest(self) -> Digest:
        """Digest of everything written so far."""
        return Digest(self._bytes, self._hash.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Yield a writer of a new file, which is fsynced at the end of the block. Not atomic: `path` must be temporary.

    Raises:
        OSError: any write failed; its ``filename`` is `path`.
    """
    try:
        with open(path, "wb", buffering=0) as file:
            writer = Writer(file)
            yield writer
            if writer.error is not None:
                raise writer.error
            os.fsync(file.fileno())
    except OSError as error:
        add_filename(error, path)
        raise


def add_filename(error: OSError, path: Path) -> None:
    """Add a path to an error of the operating system without one: a failed write does not name its file."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (NAME.TOKEN.partial), renamed to `path` at the end of the block.

    Raises:
        OSError: the disk failed; `path` is unchanged and the temporary file removed.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # process ids are not unique across nodes
    try:
        yield temporary
        sync(temporary)  # before the rename: it must not become durable before the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace(path: Path, content: bytes | str) -> Digest:
    """Replace the content of a file (text as UTF-8) atomically.

    Raises:
        OSError: the disk failed; the file is unchanged.
    """
    with replacing(path) as temporary, writing(temporary) as writer:
        writer.write(content.encode() if isinstance(content, str) else content)
    return writer.digest


def sync(path: Path) -> None:
    """Fsync a file or a folder (its directory entries)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a folder whose files are already fsynced; the rename is durable on return.

    Raises:
        OSError: for example, `target` exists.
    """
    for folder, _, _ in os.walk(source):
        sync(Path(folder))
    os.rename(source, target)
    sync(target.parent)


def digest(path: Path) -> Digest:
    """Digest of a file's current content."""
    return Digest(path.stat().st_size, file_sha256(path))
