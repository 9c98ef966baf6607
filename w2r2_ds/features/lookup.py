"""Look up a sample's features in the cache, and write computed features in the background.

DataLoader workers read and verify the checksum. The training process writes in a thread, so that a step does not wait
for the disk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w2r2_ds.features.key import features_key
from w2r2_ds.features.store import FeatureStore

logger = logging.getLogger(__name__)

MAX_PENDING = 4
"""Features that may wait in memory to be written; beyond that, a step waits for the disk."""


@dataclass(frozen=True)
class CacheLookup:
    """Result of a cache lookup: one sample's features of one encoder.

    Attributes:
        cache: the cache that was searched.
        key: key of the features.
        metadata: contents of the file's header: kind of the features, encoder identity and frame paths.
        features: None if the cache does not have them; then the caller computes them and calls `write_async`.
    """

    cache: FeatureStore
    key: str
    metadata: dict[str, Any]
    features: torch.Tensor | None

    def matches(self, frames: Sequence[Path]) -> bool:
        """Whether the key is that of these frames' current content."""
        return self.key == features_key(self.metadata["encoder"], frames)

    def is_outdated(self) -> bool:
        """Whether the features were missing at lookup and have been written since."""
        return self.features is None and self.cache.has(self.key)

    def write_async(self, features: torch.Tensor) -> None:
        """Write computed features to the cache in the background.

        Blocks for the copy to the CPU, and while `MAX_PENDING` writes are pending.
        """
        while _pending and (_pending[0].done() or len(_pending) >= MAX_PENDING):
            _pending.popleft().result()
        _pending.append(_writer.submit(_write, self.cache, self.key, features.detach().cpu(), self.metadata))


@dataclass(frozen=True)
class FeatureCache:
    """Look up features of both encoders by frames; picklable.

    Attributes:
        cache: the cache on disk.
        geometry: identity of the geometry encoder and its input (``key.encoder_identity``).
        vision: identity of the vision tower and its input; None if its features are not cached.
    """

    cache: FeatureStore
    geometry: str
    vision: str | None = None

    def find_3d(self, frames: Sequence[Path]) -> CacheLookup:
        """Geometry features ``[frames, h, w, channels]``."""
        return self._find("geometry", self.geometry, frames)

    def find_2d(self, frames: Sequence[Path]) -> CacheLookup | None:
        """Vision tower features ``[tokens, hidden]`` in frame order; None if they are not cached."""
        return None if self.vision is None else self._find("2d", self.vision, frames)

    def _find(self, kind: str, identity: str, frames: Sequence[Path]) -> CacheLookup:
        key = features_key(identity, frames)
        metadata = {"kind": kind, "encoder": identity, "frames": [str(path) for path in frames]}
        return CacheLookup(self.cache, key, metadata, self.cache.read(key))


_writer = ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
_pending: deque[Future[None]] = deque()
_warned: set[str] = set()
_sizes: dict[Path, int] = {}


def flush() -> None:
    """Wait for pending writes; errors other than OSError are raised here or by a later `write_async`."""
    while _pending:
        _pending.popleft().result()


def size_of(cache: FeatureStore) -> int:
    """Size of a cache in bytes, measured after this process's last write.

    Raises:
        OSError: a folder of the cache cannot be listed.
    """
    if cache.folder not in _sizes:
        _sizes[cache.folder] = cache.size()
    return _sizes[cache.folder]


def _write(cache: FeatureStore, key: str, features: torch.Tensor, metadata: dict[str, Any]) -> None:
    try:
        written = cache.write(key, features, metadata)
    except OSError as error:
        _warn_once(f"The feature cache {cache.folder} cannot be written ({error.strerror or error})")
    else:
        if not written:
            _warn_once(f"The feature cache {cache.folder} is full: raise data.cache_gib, or delete its old files")
        with suppress(OSError):
            # Listing a network disk takes seconds: do it in this thread, not in the training step that logs the size.
            _sizes[cache.folder] = cache.size()


def _warn_once(problem: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        logger.warning("%s. Uncached features are recomputed every epoch.", problem)
