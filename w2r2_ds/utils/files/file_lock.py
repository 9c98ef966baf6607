"""Lock an output folder, so that only one process writes to it at a time.

The kernel releases the lock (`flock`) when the process ends or is killed. It works between machines if the file system
supports that (NFSv4, Lustre mounted with ``flock``).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from w2r2_ds.utils.files.output_folder import make_folder

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(file: Path, activity: str, alternative: str) -> Iterator[None]:
    """Hold a lock while the block runs; the lock file is removed afterwards.

    On a file system without locks, a warning is logged and the block runs without one.

    Args:
        file: lock file; its folder is created.
        activity: work done under the lock, for the message, such as ``"runs/x is being prepared"``.
        alternative: what the user can do instead of waiting, for the message, such as ``"use another --out"``.

    Raises:
        ValueError: another process holds the lock; the message names its process id, machine and start time.
    """
    make_folder(file.parent)
    # Not 0: a second attempt is needed if the holder ends and removes the file after this process has opened it.
    lock = FileLock(file, timeout=0.2)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{activity} by {_holder(file)}; wait until it has ended, or {alternative}.") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        reason = os.strerror(error.errno)
        logger.warning("%s: this file system has no locks (%s); run one command at a time here", file, reason)
    try:
        since = datetime.now().isoformat(" ", "seconds")
        file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        # Removed before the release: a process that has opened the file in between then finds it deleted and retries.
        file.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    """Process id, machine and start time of the process that holds the lock, from the file."""
    try:
        holder = json.loads(file.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # removed, or not completely written
        return "another process"
