"""Folders that a writer fills beside its target and renames at the end, and what killed writers left of them."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path


def partial_folder(root: Path) -> Path:
    """Where this process writes ``root``: hidden, beside it, named after the machine and the process."""
    return root.parent / f".{root.name}.partial-{socket.gethostname()}-{os.getpid()}"


def remove_leftovers(root: Path) -> None:
    """Remove the partial folders of ``root`` whose writers no longer live.

    Another machine that shares the disk cannot be asked, so its folders stay. Names without a machine (written before
    there were names with one) are taken for this machine's.
    """
    name = re.compile(rf"\.{re.escape(root.name)}\.partial-(?:(?P<host>.+)-)?(?P<pid>\d+)")
    for folder in root.parent.iterdir():
        match = name.fullmatch(folder.name)
        if match and match["host"] in (None, socket.gethostname()) and not _lives(int(match["pid"])):
            shutil.rmtree(folder, ignore_errors=True)  # another new writer may be removing it too


def _lives(pid: int) -> bool:
    """Whether a process of this machine has the number ``pid``."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
