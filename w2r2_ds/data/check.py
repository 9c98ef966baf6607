"""Frame files looked at before the work starts, so that a truncated one is not found hours later."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from w2r2_ds.data.images import load_frame
from w2r2_ds.data.sample import Sample

ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xae\x42\x60\x82"}
"""How a JPEG and a PNG begin, and what stands at their end: a marker, and the last chunk with its checksum."""
TAIL = 1024
"""Bytes at the end of a file in which its end is looked for; some programs append a few of their own."""
THREADS = 16
"""Reads in flight; on a network file system each of them is a wait."""


def check_frames(samples: Sequence[Sample], rank: int = 0, world_size: int = 1) -> int:
    """Look at every distinct frame file of the samples, or at this rank's share of them.

    Two short reads per file: it must end as a JPEG or a PNG does. One that does not, or begins as neither, is decoded
    in full, so that what is refused cannot be read either. Damage before the end is left to the loader.

    Args:
        samples: whose frames.
        rank: which share, of
        world_size: shares.

    Returns:
        The number of files looked at.

    Raises:
        ValueError: the first file that is missing or cannot be read, by name.
    """
    files = list(dict.fromkeys(path for sample in samples for path in sample.frames))[rank::world_size]
    with ThreadPoolExecutor(THREADS) as pool:
        for path, whole in zip(files, pool.map(ends_well, files), strict=True):
            if not whole:
                load_frame(path)
    return len(files)


def ends_well(path: Path) -> bool:
    """Whether a file begins and ends as a JPEG or a PNG does; False too where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(max(0, file.seek(0, 2) - TAIL))
            tail = file.read()
    except OSError:
        return False
    return any(head.startswith(start) and end in tail for start, end in ENDS.items())
