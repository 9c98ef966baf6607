"""A sample's features on their way: looked up where it is loaded, computed and written where they are missing.

Loader processes read (and so pay for the checksum); the training process writes, in a thread, so that a step does not
wait for the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w2r2_ds.features.key import features_key
from w2r2_ds.features.store import Cache

BACKLOG = 4
"""Features that wait in memory to be written; a step that makes more waits for the disk."""


@dataclass(frozen=True)
class Cached:
    """One sample's features of one encoder, or where they shall be kept.

    Attributes:
        cache: where.
        key: of the features.
        about: what they are of, for the file.
        features: None where the cache lacks them: then the encoder makes them, and `keep` is called.
    """

    cache: Cache
    key: str
    about: dict[str, Any]
    features: torch.Tensor | None

    def is_of(self, frames: Sequence[Path]) -> bool:
        """Whether these frames are still what the key was made of."""
        return self.key == features_key(self.about["encoder"], frames)

    def is_learnt(self) -> bool:
        """Whether the cache lacked these features when it was asked, and has them now."""
        return self.features is None and self.cache.has(self.key)

    def keep(self, features: torch.Tensor) -> None:
        """Write features that have just been made; comes back before that is done. On a GPU this waits for them."""
        while _pending and (_pending[0].done() or len(_pending) >= BACKLOG):
            _pending.popleft().result()
        _pending.append(_writer.submit(_write, self.cache, self.key, features.detach().cpu(), self.about))


@dataclass(frozen=True)
class FeatureCache:
    """How a loader finds what need not be computed; may be sent to other processes.

    Attributes:
        cache: where it lies.
        geometry: identity of the geometry encoder with its input (``cache_key.encoder_identity``).
        vision: likewise of the vision tower; None where its features are not cached.
    """

    cache: Cache
    geometry: str
    vision: str | None = None

    def find_3d(self, frames: Sequence[Path]) -> Cached:
        """Geometry features ``[frames, h, w, channels]``, as the encoder gives them."""
        return self._find("geometry", self.geometry, frames)

    def find_2d(self, frames: Sequence[Path]) -> Cached | None:
        """Features ``[tokens, hidden]`` of the vision tower, frame after frame; None where they are not cached."""
        return None if self.vision is None else self._find("2d", self.vision, frames)

    def _find(self, kind: str, identity: str, frames: Sequence[Path]) -> Cached:
        key = features_key(identity, frames)
        about = {"kind": kind, "encoder": identity, "frames": [str(path) for path in frames]}
        return Cached(self.cache, key, about, self.cache.read(key))


_writer = ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
_pending: deque[Future[None]] = deque()
_said: set[str] = set()
_sizes: dict[Path, int] = {}


def flush() -> None:
    """Wait until all that was kept is written; errors that are no disk's come up here."""
    while _pending:
        _pending.popleft().result()


def size_of(cache: Cache) -> int:
    """Bytes of a cache, as this process saw them after the last time it wrote.

    Raises:
        OSError: a part of it may not be listed.
    """
    if cache.folder not in _sizes:
        _sizes[cache.folder] = cache.size()
    return _sizes[cache.folder]


def _write(cache: Cache, key: str, features: torch.Tensor, about: dict[str, Any]) -> None:
    try:
        kept = cache.write(key, features, about)
    except OSError as error:
        _say_once(f"the feature cache {cache.folder} cannot be written ({error.strerror or error})")
    else:
        if not kept:
            _say_once(f"the feature cache {cache.folder} holds all that data.cache_gib allows")
        with suppress(OSError):
            _sizes[cache.folder] = cache.size()  # here: a network's disk takes seconds to list, and a step logs it


def _say_once(what: str) -> None:
    if what not in _said:
        _said.add(what)
        print(f"warning: {what}; what it lacks is computed every time.", flush=True)
