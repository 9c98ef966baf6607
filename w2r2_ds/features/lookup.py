"""Look up a sample's features in the cache, and write computed features in the background.

DataLoader workers read files and verify their checksums. The training process writes in a thread, so that a step does
not wait for the disk.
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
"""Maximum number of features that are in memory to be written; with more, a step waits for the disk."""


@dataclass(frozen=True)
class CacheLookup:
    """Result of a cache lookup: one sample's features of one encoder, or None.

    Attributes:
        store: store that was searched.
        key: cache key of the features.
        metadata: description in the file's header: kind of the features, encoder identity and frame paths.
        features: features from the store; None if it does not have them. The caller then computes them and calls
            `write_async`.
    """

    store: FeatureStore
    key: str
    metadata: dict[str, Any]
    features: torch.Tensor | None

    def matches(self, frames: Sequence[Path]) -> bool:
        """Whether the key is that of the current content of `frames`."""
        return self.key == features_key(self.metadata["encoder"], frames)

    def is_outdated(self) -> bool:
        """Whether the features were missing at lookup and have been written since."""
        return self.features is None and self.store.has(self.key)

    def write_async(self, features: torch.Tensor) -> None:
        """Write computed features to the store in the background.

        Blocks for the copy to the CPU, and while `MAX_PENDING` writes are pending. An OSError of a write is logged as a
        warning; other errors of earlier writes are raised here.
        """
        # Remove finished writes from the queue, which raises their errors, and wait for the oldest one if it is full.
        while _pending and (_pending[0].done() or len(_pending) >= MAX_PENDING):
            _pending.popleft().result()
        _pending.append(_writer.submit(_write, self.store, self.key, features.detach().cpu(), self.metadata))


@dataclass(frozen=True)
class FeatureCache:
    """Features of both encoders by frames, in a store on disk; picklable.

    Attributes:
        store: store on disk.
        geometry: identity of the geometry encoder and its pre-processing (``key.encoder_identity``).
        vision: identity of the vision tower and its pre-processing; None if its features are not cached.
    """

    store: FeatureStore
    geometry: str
    vision: str | None = None

    def find_3d(self, frames: Sequence[Path]) -> CacheLookup:
        """Look up geometry features, ``[frames, h, w, channels]``."""
        return self._find("geometry", self.geometry, frames)

    def find_2d(self, frames: Sequence[Path]) -> CacheLookup | None:
        """Look up 2D features, ``[tokens, hidden]`` in frame order; None if only geometry features are cached."""
        return None if self.vision is None else self._find("2d", self.vision, frames)

    def _find(self, kind: str, identity: str, frames: Sequence[Path]) -> CacheLookup:
        key = features_key(identity, frames)
        metadata = {"kind": kind, "encoder": identity, "frames": [str(path) for path in frames]}
        return CacheLookup(self.store, key, metadata, self.store.read(key))


# State of this process: one thread writes, in the order of the calls.
_writer = ThreadPoolExecutor(1, thread_name_prefix="feature-cache")
_pending: deque[Future[None]] = deque()
_warned: set[str] = set()
_sizes: dict[Path, int] = {}  # folder -> size in bytes


def flush_writes() -> None:
    """Wait for pending writes; errors other than OSError are raised here or by a later `write_async`."""
    while _pending:
        _pending.popleft().result()


def last_size(store: FeatureStore) -> int:
    """Size of a store in bytes, measured after this process's last write.

    Raises:
        OSError: a folder of the store cannot be listed.
    """
    if store.folder not in _sizes:
        _sizes[store.folder] = store.size()
    return _sizes[store.folder]


def _write(store: FeatureStore, key: str, features: torch.Tensor, metadata: dict[str, Any]) -> None:
    """Write a file and measure the store; runs in the writer thread.

    Training continues if the disk fails or the store is full, because the cache only saves time.
    """
    try:
        written = store.write(key, features, metadata)
    except OSError as error:
        _warn_once(f"The feature cache {store.folder} cannot be written ({error.strerror or error})")
    else:
        if not written:
            _warn_once(f"The feature cache {store.folder} is full: raise data.cache_gib, or delete its old files")
        with suppress(OSError):
            # Listing a network disk takes seconds: do it in this thread, not in the training step that logs the size.
            _sizes[store.folder] = store.size()


def _warn_once(problem: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        logger.warning("%s. Uncached features are recomputed every epoch.", problem)
