"""Features of frozen encoders on disk: one safetensors file per key, in a folder of at most so many bytes.

    FOLDER/ab/KEY.safetensors     one tensor, and in its header the key, its checksum and what it is of

Any number of processes on any number of nodes may read and write it. A file is written aside and renamed, so that a
killed writer leaves none or a whole one; two that write the same key write the same bytes, and the later rename wins.
Every read compares the checksum: it is taken where the data are loaded, not where the model waits.
When a file was used last is its modification time, which a read sets without writing anything.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from w2r2_ds.utils import atomic_io

FEATURES = "features"
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
PARTIAL = re.compile(r"[0-9a-f]{64}\.safetensors\.[0-9a-f]+\.partial")
ABANDONED = 3600.0
"""Seconds after which what is still written aside belongs to a process that is gone."""
GRACE = 600.0
"""Seconds before a process began in which what was used is not evicted: another one may be reading it."""
HEADER = 4096
"""Bytes that a file has at most besides its tensor, as it is reckoned before it is written."""


class NoRoom(Exception):
    """There is no room for another file below the limit."""


@dataclass(frozen=True)
class Cache:
    """A folder of features; equal objects are the same cache, and it may be sent to other processes.

    Attributes:
        folder: made when something is written.
        limit: bytes that its files have together at most; files that are just being written come on top.
        began: `time.time` before which something must have been used last to be evicted. An epoch uses everything once,
            in another order: if what this run has made were evicted for what it makes next, nothing would be found.
    """

    folder: Path
    limit: int
    began: float = field(default_factory=lambda: time.time() - GRACE, compare=False)

    def path(self, key: str) -> Path:
        """Where the features of a key lie, whether they do or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file of this key where this process may look."""
        return os.path.exists(self.path(key))  # pathlib's raises where a folder is another user's

    def read(self, key: str) -> torch.Tensor | None:
        """Features, mapped into memory and compared with their checksum; None where there are none.

        A file that is damaged is named and removed, so that it is made again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about, features = file.metadata() or {}, file.get_tensor(FEATURES)
        except (OSError, RuntimeError) as error:  # not the file's fault; torch, which maps it, has a RuntimeError
            if why := _why_unreadable(path, error):
                print(f"warning: {path} cannot be read ({why}); its features are computed.", flush=True)
            return None
        except SafetensorError as error:
            wrong = str(error)
        else:
            wrong = _what_is_wrong(key, about, features)
        if wrong:
            print(f"warning: {path} is damaged ({wrong}); it is made again.", flush=True)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(path)
        return features

    def write(self, key: str, features: torch.Tensor, about: Mapping[str, Any]) -> bool:
        """Keep features, unless they are there; returns whether they are now.

        Args:
            key: 64 hexadecimal digits.
            features: on the CPU.
            about: what they are of, for people who look into the file.

        Raises:
            OSError: the disk failed; nothing is left behind.
        """
        path, features = self.path(key), features.contiguous()
        if self.has(key):
            return True
        header = {"key": key, "checksum": checksum(features), "about": json.dumps(about)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.make_room(file_size(features.shape, features.dtype))
            with atomic_io.replacing(path) as aside:
                aside.write_bytes(save({FEATURES: features}, header))  # its own writer shuts other users out
                self.make_room(0)  # again: others may have written meanwhile
        except NoRoom:
            return False
        return True

    def size(self) -> int:
        """Bytes of all files; what is just being written does not count yet."""
        return sum(size for _, size, path in self._files() if NAME.fullmatch(path.name))

    def make_room(self, needed: int) -> None:
        """Evict files, the one whose last use is oldest first, until `needed` bytes fit below the limit.

        Raises:
            NoRoom: what remains is in use; then nothing was evicted.
        """
        files = self._files()
        excess = sum(size for _, size, _ in files) + needed - self.limit
        chosen = []
        for used, size, path in sorted(files):
            if excess <= 0:
                break
            if used < self.began and NAME.fullmatch(path.name):
                chosen.append(path)
                excess -= size
        if excess > 0:
            raise NoRoom
        for path in chosen:
            path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes and path of every file of ours; what a killed writer left is removed."""
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
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found


def _why_unreadable(path: Path, error: Exception) -> str:
    """Empty where there is no file, or no longer; safetensors says so too of one that may not be opened."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return ""
    except OSError as refusal:
        return refusal.strerror or str(refusal)
    return str(error)


def _what_is_wrong(key: str, about: Mapping[str, str], features: torch.Tensor) -> str:
    """Empty for a file that is as it was written."""
    if about.get("key") != key:
        return "it belongs to another key"
    return "" if about.get("checksum") == checksum(features) else "its checksum differs"


def checksum(features: torch.Tensor) -> str:
    """Of values, shape and dtype; CRC-32, which no flipped bit escapes, at 2.5 GB/s (SHA-256: 1.5 GB/s)."""
    values = features.detach().contiguous().flatten().view(torch.uint8).numpy()
    start = zlib.crc32(f"{features.dtype} {list(features.shape)}".encode())
    return f"{zlib.crc32(values.data, start):08x}"


def file_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that the file of such features has at most."""
    return torch.Size(shape).numel() * dtype.itemsize + HEADER


def gib(size: int) -> str:
    """Bytes as a text."""
    return f"{size / 2**30:.3g} GiB"
