"""One process at a time per output folder; another one is refused by name.

The lock is `flock`'s, held by the process: the kernel lets go of it when the process ends, however it ends, so that a
killed one never blocks. It holds on one machine, and between machines where the file system shares locks (NFSv4,
Lustre mounted with ``flock``). The file itself means nothing: it only says who has it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from w2r2_ds.utils.sanitize import one_line

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


@contextmanager
def locked(file: Path, what: str, otherwise: str) -> Iterator[None]:
    """Hold a lock while the block runs; the file is removed after it.

    Args:
        file: of the lock; its folder is made.
        what: what happens in the block, ``"runs/x/evaluation: scanrefer, fused, is being evaluated"``.
        otherwise: what else a user may do, ``"give another --out"``.

    Raises:
        ValueError: another process holds it; the sentence names process, machine and time.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(file.parent)) from None
    descriptor = _acquire(file, what, otherwise)
    _held.add(descriptor)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it before looks again, see `_acquire`.
        file.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(file: Path, what: str, otherwise: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not _lock(descriptor, file):
                raise ValueError(f"{what} by {_owner(descriptor)}; wait until it has ended, or {otherwise}.")
            if _is_there(file, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one before removed the file between our opening and locking it


def _lock(descriptor: int, file: Path) -> bool:
    """Whether the lock is ours; a file system without locks is said, once per lock, and does not stop the work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"{file}: this file system has no locks ({error.strerror}); let one command at a time write here",
            flush=True,
        )
    return True


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _owner(descriptor: int) -> str:
    """Who has it; whoever is just about to sign is only "another process"."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return one_line(f"process {about['pid']} on {about['host']} since {about['since']}")
    except (ValueError, KeyError, TypeError):
        return "another process"


def _close_in_child() -> None:
    """A forked loader process must not keep the lock of a parent that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
