"""Feature store on disk: one safetensors file per key, in a folder with a maximum size.

    FOLDER/ab/KEY.safetensors     one tensor; the header has the key, the checksum and a description of the features

Any number of processes and nodes can read and write it. A file is published by a rename: it is written under a
temporary name, fsynced and renamed, so a killed writer leaves no file or a complete one. Two writers of one key write
the same bytes, and the later rename wins. Every read verifies the checksum, in a DataLoader worker and not in the
training step. A full store accepts no more files; nothing is evicted.
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

from w2r2_ds.utils.files import atomic_io

logger = logging.getLogger(__name__)

FEATURES = "features"
"""Name of the tensor in a file."""
FILE_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
PARTIAL = re.compile(r"[0-9a-f]{64}\.safetensors\.[0-9a-f]+\.partial")
ABANDONED = 3600.0
"""Age in seconds at which a temporary file is removed, because its writer must have been killed."""
HEADER = 4096
"""Upper bound of the size in bytes of a file's header, to estimate the file size before writing."""


class _StoreFullError(Exception):
    """The files would exceed the limit."""


@dataclass(frozen=True)
class FeatureStore:
    """A folder of feature files; picklable, and compared by its attributes.

    Attributes:
        folder: folder of the files, created by the first write.
        limit: maximum size of all files in bytes.
    """

    folder: Path
    limit: int

    def path(self, key: str) -> Path:
        """Path of a key's file, whether it exists or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a key's file exists, in a folder that this process may search."""
        return os.path.exists(self.path(key))  # Path.exists raises PermissionError in another user's folder

    def read(self, key: str) -> torch.Tensor | None:
        """Features, memory-mapped and verified against their checksum; None if the store does not have them.

        A file that cannot be read is logged. A damaged file is logged and removed, so that it is written again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                header, features = file.metadata() or {}, file.get_tensor(FEATURES)
        except (OSError, RuntimeError) as error:  # missing or not readable; torch's memory map raises RuntimeError
            if reason := _read_error(path, error):
                logger.warning("%s cannot be read (%s); its features are computed.", path, reason)
            return None
        except SafetensorError as error:
            damage = str(error)
        else:
            damage = _damage(key, header, features)
        if damage:
            logger.warning("%s is damaged (%s); it is removed and computed again.", path, damage)
            with suppress(OSError):  # a read-only cache
                path.unlink()
            return None
        return features

    def write(self, key: str, features: torch.Tensor, metadata: Mapping[str, Any]) -> bool:
        """Write features unless their file exists.

        Args:
            key: cache key, 64 hexadecimal digits.
            features: tensor on the CPU.
            metadata: description for people who inspect the file; serialisable as JSON.

        Returns:
            False if the store is full, else True.

        Raises:
            OSError: the disk failed; no file is left behind.
        """
        path, features = self.path(key), features.contiguous()
        if self.has(key):
            return True
        header = {"key": key, "checksum": checksum(features), "about": json.dumps(metadata)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_limit(file_size(features.shape, features.dtype))
            with atomic_io.replacing(path) as temporary:
                # safetensors' save_file would create the file with mode 600: other users could not read it.
                temporary.write_bytes(save({FEATURES: features}, header))
                # Check again before the rename, with the temporary files of all writers counted: several processes may
                # have passed the first check at once. `replacing` then removes the temporary file.
                self._check_limit(0)
        except _StoreFullError:
            return False
        return True

    def size(self) -> int:
        """Size of all complete files in bytes."""
        return sum(size for name, size in self._files() if FILE_NAME.fullmatch(name))

    def _check_limit(self, needed: int) -> None:
        """Raise `_StoreFullError` if `needed` more bytes would exceed the limit."""
        if sum(size for _, size in self._files()) + needed > self.limit:
            raise _StoreFullError

    def _files(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every complete or temporary file; removes abandoned temporary files."""
        found = []
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(folder):
                partial = PARTIAL.fullmatch(entry.name)
                if not partial and not FILE_NAME.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # renamed or removed by another process since the listing
                    continue
                if partial and time.time() - status.st_mtime > ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
                else:
                    found.append((entry.name, status.st_size))
        return found


def _read_error(path: Path, error: Exception) -> str:
    """Reason why a file cannot be read; empty if it does not exist.

    The file is opened again, because safetensors also reports a file without read permission as missing.
    """
    try:
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return ""
    except OSError as cause:
        return cause.strerror or str(cause)
    return str(error)


def _damage(key: str, header: Mapping[str, str], features: torch.Tensor) -> str:
    """Description of the damage of a file that was read; empty if it is intact."""
    if header.get("key") != key:
        return "it belongs to another key"
    return "" if header.get("checksum") == checksum(features) else "its checksum differs"


def checksum(features: torch.Tensor) -> str:
    """CRC-32 of values, shape and dtype: detects every single flipped bit, at 2.5 GB/s (SHA-256: 1.5 GB/s)."""
    # viewed as bytes, because NumPy has no bfloat16
    values = features.detach().contiguous().flatten().view(torch.uint8).numpy()
    start = zlib.crc32(f"{features.dtype} {list(features.shape)}".encode())
    return f"{zlib.crc32(values.data, start):08x}"


def file_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Upper bound of the size in bytes of a file with features of this shape and dtype."""
    return torch.Size(shape).numel() * dtype.itemsize + HEADER


def gib(size: int) -> str:
    """Format a number of bytes as GiB, such as ``"1.25 GiB"``."""
    return f"{size / 2**30:.3g} GiB"
