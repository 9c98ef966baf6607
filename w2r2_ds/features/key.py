"""What makes two features the same: the content of the ordered frames, and everything that the encoder depends on.

Content, not name and date: a key holds where scenes are moved or copied to another node, tasks that look at the same
frames share one file, and a frame that is replaced behind our back cannot be taken for the old one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.utils import atomic_io

VERSION = 1
"""Of pre-processing and encoders' code; raised whenever they give other values for the same frames and weights."""
REMEMBERED = 2**17
"""Digests of frames that a process keeps."""


def encoder_identity(about: Mapping[str, Any]) -> str:
    """Hash of all facts about an encoder and its input besides the frames; `about` is plain JSON."""
    return hashlib.sha256(json.dumps([VERSION, about], sort_keys=True).encode()).hexdigest()


def features_key(identity: str, frames: Sequence[Path]) -> str:
    """64 hexadecimal digits for an encoder's features of these frames in this order.

    Raises:
        ValueError: a frame cannot be read.
    """
    digests = [frame_digest(path) for path in frames]
    return hashlib.sha256(json.dumps([identity, digests]).encode()).hexdigest()


def frame_digest(path: Path) -> str:
    """SHA-256 of a file's content, read again only after the file was changed or replaced.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        status = os.stat(path)
        # No program can set the time of change back, as it can that of modification.
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _digest(path, seen)
    except OSError as error:
        raise ValueError(
            f"Frame {path} cannot be read ({error.strerror}); extract the scene's frames again, or correct data.root."
        ) from error


@functools.lru_cache(REMEMBERED)
def _digest(path: Path, seen: tuple[int, ...]) -> str:
    return atomic_io.digest(path).sha256
