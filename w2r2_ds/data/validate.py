"""Check frame files and texts of a data set before a run starts, so that a bad sample does not stop it hours later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from w2r2_ds.config.schema import GeometryAugmentationConfig
from w2r2_ds.data.frames.geometry_augmentation import with_longest_numbers
from w2r2_ds.data.images import THREADS, check_frame, frame_size
from w2r2_ds.data.processor import Processor, SequenceTooLong
from w2r2_ds.data.sources.depth_frames import check_depth_frame, raw_pose
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample

logger = logging.getLogger(__name__)

MAX_LISTED = 5
"""Number of samples that a message lists besides the first one."""


def check_frames(samples: Sequence[Sample], rank: int = 0, world_size: int = 1) -> int:
    """Check that the distinct frame files of the samples are complete images; every rank checks a part of them.

    Short reads per file: it must begin and end as a JPEG or a PNG file does, and its header must be that of a colour
    image. Any other file is decoded, which raises the error that training would raise. Damage in the middle of a
    file is not detected here.

    Args:
        samples: samples whose frames are checked.
        rank: rank of this process; it checks every `world_size`-th file.
        world_size: number of ranks.

    Returns:
        The number of files that this rank checked.

    Raises:
        ValueError: a file is missing or cannot be read; the message names the first one.
    """
    files = _own_frames(samples, rank, world_size)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check_frame, files):
            pass
    return len(files)


def check_geometry_files(
    samples: Sequence[Sample], name: str, geometry: GeometrySpec, rank: int = 0, world_size: int = 1
) -> int:
    """Check depth images, intrinsics and poses of the distinct frames, as far as the geometry encoder needs them.

    Args:
        samples: samples whose frames have passed `check_frames`.
        name: name of the geometry encoder (`model.geometry.name`), for messages.
        geometry: kind of its input.
        rank: rank of this process; it checks every `world_size`-th frame.
        world_size: number of ranks.

    Returns:
        The number of frames that this rank checked; 0 for an encoder of images without scale hint.

    Raises:
        ValueError: a file is missing or cannot be used; the message names the first one, and the option that needs it.
    """
    spec, hint = geometry.point_maps, geometry.scale_hint
    if spec is None and hint == "none":
        return 0
    files, needs_poses = _own_frames(samples, rank, world_size), spec is not None and spec.needs_poses
    check: Callable[[Path], object] = partial(check_depth_frame, with_pose=needs_poses)
    needed = "a depth image and a camera pose" if needs_poses else "a depth image"
    if hint == "poses":
        check, needed = raw_pose, "a camera pose"
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(check, files):
                pass
    except ValueError as error:
        option = f"model.geometry.scale_hint {hint}" if spec is None else f"model.geometry.name {name}"
        raise ValueError(f"{option} needs {needed} of every frame: {error}") from error
    return len(files)


def _own_frames(samples: Sequence[Sample], rank: int, world_size: int) -> list[Path]:
    """Every `world_size`-th of the distinct frame files of the samples."""
    return list(dict.fromkeys(path for sample in samples for path in sample.frames))[rank::world_size]


def describe_frames(samples: Sequence[Sample], processor: Processor) -> str:
    """Text for the log: frame sizes of the first sample for both encoders."""
    sample = next((sample for sample in samples if sample.frames), None)
    if sample is None:
        return "no sample has frames"
    (width, height), tower = processor.preprocess.sizes(sample.frames)
    sizes = f"{width} x {height} for the geometry encoder, {tower[0]} x {tower[1]} for the vision tower"
    return f"frames {sizes} (of {sample.id})"


def check_sample_texts(
    samples: Sequence[Sample],
    processor: Processor,
    rank: int = 0,
    world_size: int = 1,
    with_answer: bool = True,
    augmentation: GeometryAugmentationConfig | None = None,
) -> int:
    """Check texts and sequence lengths of the samples without decoding frames; every rank checks a part of them.

    Args:
        samples: samples whose frames have passed `check_frames`.
        processor: processor of the run.
        rank: rank of this process; it checks a contiguous part.
        world_size: number of ranks.
        with_answer: True for prompt and answer (training), False for the prompt only (generation).
        augmentation: random changes of the texts' numbers; the longest numbers count. None for no changes.

    Returns:
        The number of samples that this rank checked.

    Raises:
        ValueError: a text contains a special token or is changed by the chat template, or a sequence is too long. The
            message is that of the first such sample; it lists the ids of a few others, and the length of the longest.
    """
    # The samples of a contiguous part are from few scenes, so two ranks rarely read the header of the same frame.
    begin, end = (len(samples) * index // world_size for index in (rank, rank + 1))
    own = samples[begin:end]
    sizes = read_sizes(own)
    warn_of_crop(sizes, processor.preprocess)
    failures: list[tuple[str, ValueError]] = []
    for sample in own:
        try:
            longest = sample if augmentation is None else with_longest_numbers(sample, augmentation)
            processor.check(longest, [sizes[path] for path in sample.frames], with_answer)
        except ValueError as error:
            failures.append((sample.id, error))
    if failures:
        raise ValueError(_message(failures)) from failures[0][1]
    return len(own)


def read_sizes(samples: Sequence[Sample]) -> dict[Path, tuple[int, int]]:
    """``(width, height)`` in pixels of every distinct frame file, from its header."""
    files = list(dict.fromkeys(path for sample in samples for path in sample.frames))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(frame_size, files), strict=True))


def warn_of_crop(sizes: Mapping[Path, tuple[int, int]], preprocess: VisualPreprocessor) -> None:
    """Log how many frames lose a part of their height (`data.frame_fit: crop`), and how much at most.

    Args:
        sizes: frame file -> ``(width, height)`` in pixels.
        preprocess: preprocessor of the run.

    Raises:
        ValueError: a frame is too narrow; the message has the path.
    """
    lost = {path: preprocess.lost_height(path, size) for path, size in sizes.items()}
    worst = max(lost, key=lost.__getitem__, default=None)
    if worst is not None and lost[worst]:
        logger.warning(
            "%d of %d frames are higher than wide and are cropped at top and bottom: up to %.0f %% of the height (%s). "
            "data.frame_fit: pad keeps all of it.",
            sum(fraction > 0 for fraction in lost.values()),
            len(lost),
            100 * lost[worst],
            worst,
        )


def _message(failures: Sequence[tuple[str, ValueError]]) -> str:
    """Message of the first error, with the ids of other samples and the length of the longest sequence."""
    first, others = str(failures[0][1]), [identity for identity, _ in failures[1:]]
    if not others:
        return first
    also = "also " + ", ".join(others[:MAX_LISTED])
    if len(others) > MAX_LISTED:
        also += f" and {len(others) - MAX_LISTED} more"
    longest = max(error.tokens if isinstance(error, SequenceTooLong) else 0 for _, error in failures)
    return f"{first.removesuffix('.')} ({also}{f'; the longest has {longest} tokens' if longest else ''})."
