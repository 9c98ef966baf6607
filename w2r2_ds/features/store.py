"""Feature cache on disk: one safetensors file per key, in a folder with a maximum size.

    FOLDER/ab/KEY.safetensors     one tensor; the header has the key, the checksum and what the features are of

Any number of processes and nodes can read and write it. A file is written to a temporary file and renamed, so a killed
writer leaves no file or a complete one. Two writers of one key write the same bytes, and the later rename wins. Every
read verifies the checksum, in the data loader and not in the training step. A full cache accepts no more files;
nothing is evicted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from w2r2_ds.utils import atomic_io

logger = logging.getLogger(__name__)

FEATURES = "features"
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
PARTIAL = re.compile(r"[0-9a-f]{64}\.safetensors\.[0-9a-f]+\.partial")
ABANDONED = 3600.0
"""Age in seconds after which a temporary file is taken for that of a dead process and removed."""
HEADER = 4096
"""Upper bound of a file's size in bytes besides its tensor, used to estimate the size before writing."""


class _CacheFullError(Exception):
    """The files would exceed the limit."""


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features; picklable, and equal objects are the same cache.

    Attributes:
        folder: created by the first write.
        limit: maximum size of all files in bytes.
    """

    folder: Path
    limit: int

    def path(self, key: str) -> Path:
        """Path of a key's file, whether it exists or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a key's file exists and this process may see it."""
        return os.path.exists(self.path(key))  # Path.exists raises PermissionError in another user's folder

    def read(self, key: str) -> torch.Tensor | None:
        """Features, memory-mapped and verified against their checksum; None if the cache does not have them.

        A damaged file is logged and removed, so that it is written again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about, features = file.metadata() or {}, file.get_tensor(FEATURES)
        except (OSError, RuntimeError) as error:  # missing or not readable; torch's memory map raises RuntimeError
            if reason := _read_error(path, error):
                logger.warning("%s cannot be read (%s); its features are computed.", path, reason)
            return None
        except SafetensorError as error:
            damage = str(error)
        else:
            damage = _damage(key, about, features)
        if damage:
            logger.warning("%s is damaged (%s); it is removed and computed again.", path, damage)
            with suppress(OSError):  # a read-only cache
                path.unlink()
            return None
        return features

    def write(self, key: str, features: torch.Tensor, about: Mapping[str, Any]) -> bool:
        """Write features unless their file exists; returns False if the cache is full.

        Args:
            key: 64 hexadecimal digits.
            features: on the CPU.
            about: description for people who inspect the file; JSON.

        Raises:
            OSError: the disk failed; no file is left behind.
        """
        path, features = self.path(key), features.contiguous()
        if self.has(key):
            return True
        header = {"key": key, "checksum": checksum(features), "about": json.dumps(about)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_limit(file_size(features.shape, features.dtype))
            with atomic_io.replacing(path) as temporary:
                # safetensors' save_file would create the file with mode 600: other users could not read it.
                temporary.write_bytes(save({FEATURES: features}, header))
                self._check_limit(0)  # again: other processes may have written in the meantime
        except _CacheFullError:
            return False
        return True

    def size(self) -> int:
        """Size of all complete files in bytes."""
        return sum(size for name, size in self._files() if NAME.fullmatch(name))

    def _check_limit(self, needed: int) -> None:
        if sum(size for _, size in self._files()) + needed > self.limit:
            raise _CacheFullError

    def _files(self) -> list[tuple[str, int]]:
        """Name and size of every complete or temporary file; removes temporary files of dead processes."""
        found = []
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(folder):
                partial = PARTIAL.fullmatch(entry.name)
                if not partial and not NAME.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed by another process
                    continue
                if partial and time.time() - status.st_mtime > ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
                else:
                    found.append((entry.name, status.st_size))
        return found


def _read_error(path: Path, error: Exception) -> str:
    """Why a file cannot be read; empty if it does not exist. safetensors reports a forbidden file as missing, too."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return ""
    except OSError as cause:
        return cause.strerror or str(cause)
    return str(error)


def _damage(key: str, about: Mapping[str, str], features: torch.Tensor) -> str:
    """Description of the damage of a file that was read; empty if it is intact."""
    if about.get("key") != key:
        return "it belongs to another key"
    return "" if about.get("checksum") == checksum(features) else "its checksum differs"


def checksum(features: torch.Tensor) -> str:
    """CRC-32 of values, shape and dtype: detects every single flipped bit, at 2.5 GB/s (SHA-256: 1.5 GB/s)."""
    values = features.detach().contiguous().flatten().view(torch.uint8).numpy()
    start = zlib.crc32(f"{features.dtype} {list(features.shape)}".encode())
    return f"{zlib.crc32(values.data, start):08x}"


def file_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Upper bound of the size in bytes of a file with such features."""
    return torch.Size(shape).numel() * dtype.itemsize + HEADER


def gib(size: int) -> str:
    """Format bytes as GiB."""
    return f"{size / 2**30:.3g} GiB"
