"""Cache key of features: hash of the frames' content, in order, and of everything that the encoder's output depends on.

The frames' content is hashed, not their path and date. So a key stays valid if scenes are moved or copied to another
node, tasks with the same frames share one file, and a replaced frame gets a new key.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.hashing import FileVersion, file_version, json_sha256

VERSION = 1
"""Version of the pre-processing and encoder code; increase it when the same frames and weights give other values."""
MAX_DIGESTS = 2**17
"""Maximum number of frame digests that a process keeps in memory."""


def encoder_identity(settings: Mapping[str, Any]) -> str:
    """Hash of an encoder, its weights and its settings: the part of the key that does not depend on the frames.

    Args:
        settings: everything that the encoder's output depends on besides the frames; serialisable as JSON.
    """
    return json_sha256([VERSION, settings])


def features_key(identity: str, frames: Sequence[Path]) -> str:
    """Cache key (64 hexadecimal digits) of an encoder's features of `frames` in this order.

    Args:
        identity: result of `encoder_identity`.
        frames: image files.

    Raises:
        ValueError: a frame cannot be read.
    """
    digests = [frame_digest(path) for path in frames]
    return json_sha256([identity, digests])


def frame_digest(path: Path) -> str:
    """SHA-256 of a file's content. The file is read again only after it was changed or replaced.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return _digest(path, file_version(path))
    except OSError as error:
        raise ValueError(
            f"Frame {path} cannot be read ({error.strerror}); extract the scene's frames again, or correct data.root."
        ) from error


@functools.lru_cache(MAX_DIGESTS)
def _digest(path: Path, version: FileVersion) -> str:
    """SHA-256 of a file; `version` is part of the key of the LRU cache, so that a changed file is hashed again."""
    return atomic_io.digest(path).sha256
