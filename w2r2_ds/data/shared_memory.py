"""How much shared memory (/dev/shm) the batches of loader processes need, and how many of them fit.

The doctor, the start of a run and every loader use these functions. They import no large library.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.images import fitted_size, frame_size, input_bytes
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.distributed import RankInfo

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")
SAMPLES_MEASURED = 8
"""Maximum number of samples, evenly spaced, from which the size of a batch is computed."""
GIB = 2**30
FLOAT32_BYTES = 4


class FeatureSizes(NamedTuple):
    """Bytes of cached features.

    Attributes:
        geometry_patch: side in pixels of a patch of the geometry encoder.
        geometry_bytes: bytes of one feature of the geometry encoder.
        token_side: side in pixels of the frame's part that is one token of the language model.
        token_bytes: bytes of one 2D feature; 0 if only geometry features are cached.
    """

    geometry_patch: int
    geometry_bytes: int
    token_side: int
    token_bytes: int


def sample_bytes(
    frames: Sequence[Path],
    config: DataConfig,
    features: FeatureSizes | None = None,
    geometry: GeometrySpec | None = None,
) -> int:
    """Largest number of bytes of a sample's frames, point maps and cached features in a batch; without tokens.

    Args:
        frames: frame files; all are counted as large as the first.
        config: frame size, and whether frames are images or a video.
        features: sizes of cached features; None without a cache.
        geometry: input of the geometry encoder; None counts no point maps.

    Raises:
        ValueError: the first frame cannot be read.
    """
    inputs = input_bytes(frames, config) + point_map_bytes(frames, config, geometry)
    if features is None:
        return inputs
    width, height = fitted_size([frame_size(frames[0])], config.frame_width, features.geometry_patch, config.frame_fit)
    patches = len(frames) * (height // features.geometry_patch) * (width // features.geometry_patch)
    images = len(frames) if config.visual == "images" else -(-len(frames) // 2)  # a temporal patch covers two frames
    tokens = images * (height // features.token_side) * (width // features.token_side)
    cached_3d, cached_2d = patches * features.geometry_bytes, tokens * features.token_bytes
    # The frames are in the batch unless both encoders' features are cached.
    return max(inputs + max(cached_3d, cached_2d), cached_3d + cached_2d)


def point_map_bytes(frames: Sequence[Path], config: DataConfig, geometry: GeometrySpec | None) -> int:
    """Bytes of a sample's point maps or scale reference; 0 for an encoder of images alone, which are the tower's."""
    if geometry is None or (geometry.point_maps is None and geometry.scale_hint == "none"):
        return 0
    width, height = fitted_size([frame_size(frames[0])], config.frame_width, geometry.patch_size, config.frame_fit)
    if geometry.point_maps is None:
        return FLOAT32_BYTES * math.prod(geometry.scale_reference_shape(len(frames), height, width) or (0,))
    return FLOAT32_BYTES * math.prod(geometry.point_map_shape(len(frames), height, width))


def batch_bytes(
    samples: Sequence[Sample],
    batch_size: int,
    config: DataConfig,
    features: FeatureSizes | None = None,
    geometry: GeometrySpec | None = None,
) -> int:
    """Bytes of a batch of `batch_size` samples with frames of their own, each as large as the largest one measured."""
    last, largest = len(samples) - 1, 0
    count = min(SAMPLES_MEASURED, len(samples))
    for index in {round(i * last / max(count - 1, 1)) for i in range(count)}:
        frames = samples[index].frames
        # A missing frame is an error of its sample, which names it when the sample is loaded.
        if frames and frames[0].is_file():
            largest = max(largest, sample_bytes(frames, config, features, geometry))
    return largest * batch_size


def needed_bytes(batch: int, workers: int, prefetch: int, ranks: int) -> int:
    """Shared memory for batches of `batch` bytes of the ranks of a machine.

    Every worker prepares `prefetch` batches, and the training process has one; without workers, batches are not shared.
    """
    return batch * (workers * prefetch + 1) * ranks if workers else 0


def free_bytes() -> int:
    """Free shared memory of this machine; 0 without /dev/shm."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else 0


def choose_prefetch(batch: int, workers: int, prefetch: int) -> int:
    """Lower `prefetch` to the largest number for which the free shared memory suffices, at least 1.

    Logs need and free memory, as a warning if it is too little. Ranks of a machine share its memory.

    Args:
        batch: bytes of a batch.
        workers: loader processes per rank.
        prefetch: batches that each of them prepares ahead (`data.prefetch`).
    """
    ranks, free = RankInfo.from_environment().local_world_size, free_bytes()
    chosen = prefetch
    while chosen > 1 and needed_bytes(batch, workers, chosen, ranks) > free:
        chosen -= 1
    needed = needed_bytes(batch, workers, prefetch, ranks)
    level = logging.INFO if needed <= free else logging.WARNING
    lowered = f"; data.prefetch is lowered from {prefetch} to {chosen}" if chosen < prefetch else ""
    logger.log(
        level,
        "shared memory: %d rank(s) with data.workers %d, data.prefetch %d and batches of %.3f GiB need %.2f GiB, "
        "%s has %.2f GiB free%s",
        *(ranks, workers, prefetch, batch / GIB, needed / GIB, SHM, free / GIB, lowered),
    )
    return chosen
