"""How a file is written so that a crash, a cut cable or a full disk leaves the old or the new one, never half of it.

Written aside, flushed to the disk (fsync), renamed, and the folder flushed too: without the last the rename itself may
be lost with the power. The digest is of the bytes that were meant to be written, not of what can be read back.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Digest:
    """Size in bytes and SHA-256 in hex of a file's content."""

    bytes: int
    sha256: str


class Writer:
    """A binary file open for writing that counts and hashes what goes through it; made by `writing`.

    The first OSError is kept and what follows is dropped: `torch.save` writes from C++, which must not see an
    exception (it would try to finish its archive and hide the error behind one of its own).
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its size in bytes, also once the disk has failed."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._bytes += len(view)
        left = view
        while len(left) and self.error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """For `torch.save`; nothing is buffered here."""

    @property
    def digest(self) -> Digest:
        """Of everything written so far."""
        return Digest(self._bytes, self._hash.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Write a new file in place (inside a folder that is itself still aside); on the disk when the block ends.

    Raises:
        OSError: the disk failed at any time; its ``filename`` is `path`.
    """
    try:
        with open(path, "wb", buffering=0) as file:
            writer = Writer(file)
            yield writer
            if writer.error is not None:
                raise writer.error
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall become `path`: beside it, as NAME.TOKEN.partial; renamed when the block ends.

    Raises:
        OSError: the disk failed; `path` is as it was and nothing lies beside it.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # process ids are not unique across nodes
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace(path: Path, content: bytes | str) -> Digest:
    """Let a file hold `content` (text as UTF-8), at once.

    Raises:
        OSError: the disk failed; the file is as it was.
    """
    with replacing(path) as aside, writing(aside) as writer:
        writer.write(content.encode() if isinstance(content, str) else content)
    return writer.digest


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a folder whose files are on the disk already; durable when this returns.

    Raises:
        OSError: above all, there is something at `target`.
    """
    for folder, _, _ in os.walk(source):
        sync(Path(folder))
    os.rename(source, target)
    sync(target.parent)


def digest(path: Path) -> Digest:
    """Of what a file holds now."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256")
        size = file.tell()
    return Digest(size, found.hexdigest())


class Lines:
    """A log that grows by whole lines; what a full disk does not take waits and goes with a later line.

    Args:
        path: appended to; made where it is missing.

    Attributes:
        waiting: bytes that are not in the file yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.waiting = b""

    def append(self, line: str) -> OSError | None:
        """Append a line, given without its line break; returns why it has to wait, if it has to."""
        self.waiting += line.encode() + b"\n"
        return self.flush()

    def flush(self) -> OSError | None:
        """Try to write what waits; a line that only begins to fit is taken back."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(self.waiting)
            while len(left):
                left = left[self._file.write(left) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            return error
        self.waiting = b""
        return None

    def sync(self) -> None:
        """Flush what was written to the disk; a disk that cannot is not worth the log's program."""
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        self._file.close()
