"""Check frame files and texts before a run starts, so that an error does not occur hours later."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from w2r2_ds.data.images import frame_size, load_frame
from w2r2_ds.data.processor import Processor, SequenceTooLong
from w2r2_ds.types.sample import Sample

ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xae\x42\x60\x82"}
"""How a JPEG and a PNG begin, and what stands at their end: a marker, and the last chunk with its checksum."""
TAIL = 1024
"""Bytes at the end of a file in which its end is looked for; some programs append a few of their own."""
THREADS = 16
"""Reads in flight; on a network file system each of them is a wait."""

NAMED = 5
"""Samples that are named besides the first one."""


def check_frames(samples: Sequence[Sample], rank: int = 0, world_size: int = 1) -> int:
    """Look at every distinct frame file of the samples, or at this rank's share of them.

    Two short reads per file: it must end as a JPEG or a PNG does. One that does not, or begins as neither, is decoded
    in full, so that a rejected file cannot be read either. Damage before the end is left to the loader.

    Args:
        samples: whose frames.
        rank: which share, of
        world_size: shares.

    Returns:
        The number of checked files.

    Raises:
        ValueError: a file is missing or cannot be read; the message names the first.
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


def describe_frames(samples: Sequence[Sample], processor: Processor) -> str:
    """Frame size of the first sample for both encoders; the VLM gets a crop that its merged patches divide."""
    sample = next((sample for sample in samples if sample.frames), None)
    if sample is None:
        return "no sample has frames"
    (width, height), (less, lower) = processor.preprocess.sizes([frame_size(path) for path in sample.frames])
    return f"frames {width} x {height} for the geometry encoder, {less} x {lower} for the vision tower (of {sample.id})"


def check_texts(
    samples: Sequence[Sample], processor: Processor, rank: int = 0, world_size: int = 1, with_answer: bool = True
) -> int:
    """Look at the texts and the length of all samples, or of this rank's share of them; no frame is decoded.

    Args:
        samples: with frames that `check_frames` has passed.
        processor: that will be given them.
        rank: which share, of
        world_size: shares.
        with_answer: for training; False for prompts alone.

    Returns:
        The number of checked samples.

    Raises:
        ValueError: the sentence of the first sample whose text holds a special token, which is too long or which the
            chat template changes; the message names the next few, and the longest length.
    """
    # A run of neighbours: they are of the same scenes, so that ranks rarely read the same file.
    begin, end = (len(samples) * share // world_size for share in (rank, rank + 1))
    mine = samples[begin:end]
    files = list(dict.fromkeys(path for sample in mine for path in sample.frames))
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = dict(zip(files, pool.map(frame_size, files), strict=True))
    rejected: list[tuple[str, ValueError]] = []
    for sample in mine:
        try:
            processor.check(sample, [sizes[path] for path in sample.frames], with_answer)
        except ValueError as error:
            rejected.append((sample.id, error))
    if rejected:
        raise ValueError(_all_of(rejected)) from rejected[0][1]
    return len(mine)


def _all_of(rejected: Sequence[tuple[str, ValueError]]) -> str:
    """The message of the first rejected sample, the ids of the others, and the longest length."""
    first, others = str(rejected[0][1]), [identity for identity, _ in rejected[1:]]
    if not others:
        return first
    also = "look also at " + ", ".join(others[:NAMED])
    if len(others) > NAMED:
        also += f" and {len(others) - NAMED} more"
    longest = max(error.tokens if isinstance(error, SequenceTooLong) else 0 for _, error in rejected)
    return f"{first.removesuffix('.')} ({also}{f'; the longest has {longest} tokens' if longest else ''})."
