"""Check an output folder before the work, and write a new one that is complete if it exists."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from w2r2_ds.utils.files.atomic_io import add_filename

PARTIAL = ".partial"
"""Suffix of the temporary folder."""
LOST_AND_FOUND = "lost+found"
"""Folder in the root of an ext4 file system, which is empty otherwise."""
GIB = 2**30


@contextmanager
def new_folder(out: Path, needed_bytes: int = 0, option: str = "--out") -> Iterator[Path]:
    """Yield an empty temporary folder, whose content becomes that of `out` at the end of the block.

    A link is followed. If `out` does not exist, the temporary folder is beside it and renamed, so `out` is complete if
    it exists. An existing empty folder may be a mount point, which cannot be replaced: then the temporary folder is
    inside, and its entries are moved up. After an error the temporary folder is removed.

    Args:
        out: folder that does not exist, or is empty.
        needed_bytes: expected size of the content.
        option: option of the folder, for messages.

    Raises:
        ValueError: at the start, `out` is a file, is not empty or cannot be written, or the disk is too full; at the
            end, the disk is full.
    """
    target = Path(os.path.realpath(out))
    # Of an earlier call that was killed; `out` is still empty then.
    temporary = (target if target.is_dir() else target.parent) / f"{target.name}{PARTIAL}"
    if target.exists() and not is_empty(target, re.escape(temporary.name)):
        problem = "is not empty" if target.is_dir() else "is a file"
        raise ValueError(f"{option} {out} {problem}; pass another folder or remove it.")
    check_writable(out, needed_bytes, option)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fill(target, temporary)
    except SafetensorError as error:  # for example of a full disk: safetensors raises no OSError
        raise ValueError(
            f"{option} {out} cannot be written ({error}); free disk space or pass another folder."
        ) from error
    except OSError as error:
        add_filename(error, out)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill(target: Path, temporary: Path) -> None:
    """Rename a finished temporary folder to `target`; if that is an empty folder, move the entries into it.

    Raises:
        OSError: `target` has other content.
    """
    if not target.is_dir():
        os.rename(temporary, target)
        return
    for path in sorted(temporary.iterdir()):
        os.rename(path, target / path.name)
    temporary.rmdir()


def is_empty(folder: Path, ignored: str = "") -> bool:
    """Whether a path is a folder without entries, except lost+found and names that match the pattern `ignored`."""
    return folder.is_dir() and all(
        path.name == LOST_AND_FOUND or re.fullmatch(ignored, path.name) for path in folder.iterdir()
    )


def check_writable(folder: Path | str, needed_bytes: int = 0, option: str = "--out") -> None:
    """Check, before the work begins, that files can be created in a folder that may not exist yet. Changes nothing.

    Args:
        folder: output folder; a link is followed.
        needed_bytes: expected size of the output.
        option: option of the folder, for the message.

    Raises:
        ValueError: the path is below a file, no file can be created in it, or the disk has too little space.
    """
    existing = existing_parent(folder)
    try:
        if not existing.is_dir():
            raise ValueError(f"{option} {folder}: {existing} is not a folder; pass another folder.")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: no file can be written in {existing} ({error.strerror}); pass another folder."
        ) from None
    if needed_bytes > free:
        raise ValueError(
            f"{option} {folder} needs about {needed_bytes / GIB:.1f} GiB, but {existing} has {free / GIB:.1f} GiB "
            "free; free disk space or pass another folder."
        )


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless it exists; also where a link to a missing folder points.

    `Path.mkdir` fails at such a link, which `check_writable` and `new_folder` follow.

    Raises:
        OSError: a part of the path is a file, or cannot be created.
    """
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def existing_parent(path: Path | str) -> Path:
    """The path itself, or its nearest parent that exists; links are followed."""
    existing = Path(os.path.realpath(path))
    while not os.path.lexists(existing):
        existing = existing.parent
    return existing
