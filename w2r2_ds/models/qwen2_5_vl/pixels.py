"""Pixel values of Qwen2.5-VL's vision tower: normalised patches in the order of transformers' Qwen2-VL processor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def patchify(
    images: np.ndarray,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    as_video: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut frames into normalised patches; equal to transformers' processor for frames that need no resizing.

    Order of the patches (rows of ``pixel_values``): image by image, or one temporal patch of a video after the other.
    Within these, row-major over blocks of ``merge_size x merge_size`` patches, and row-major inside a block, so that
    the patches of one merged token are neighbours. Order of the values of a patch: channel, time, row, column.

    Args:
        images: ``[N, 3, H, W]`` float32 in [0, 1]; H and W are multiples of ``patch_size * merge_size``.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch.
        merge_size: patches per side that the tower merges into one token.
        mean, std: per-channel mean and standard deviation of the normalisation.
        as_video: make one video of all frames, the last frame repeated to fill the last temporal patch. Otherwise each
            frame is an image, repeated in time.

    Returns:
        ``pixel_values`` float32 ``[patches, 3 * temporal_patch_size * patch_size ** 2]``, and ``grid_thw`` int64
        ``[N, 3]`` (``[1, 3]`` for a video): number of patches in time, height and width.

    Raises:
        ValueError: `images` has another shape, or sides that are not such multiples.
    """
    step = patch_size * merge_size
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"Frames have shape {images.shape}; give [frames, 3, height, width].")
    if images.shape[2] % step or images.shape[3] % step:
        raise ValueError(f"Frames of {images.shape[3]} x {images.shape[2]} pixels must be multiples of {step}.")
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    normalised = _normalise(images, mean, std)
    if as_video:
        clips = _clips(normalised, temporal_patch_size)
        grid = [[len(clips), rows, columns]]
    else:
        # The tower's patches always span `temporal_patch_size` frames.
        clips = np.repeat(normalised[:, None], temporal_patch_size, axis=1)
        grid = [[1, rows, columns]] * len(images)
    return _patchify(clips, patch_size, merge_size), np.array(grid, dtype=np.int64)


def _normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """``(images - mean) / std`` per channel, float32."""
    centre, spread = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (mean, std))
    return (images.astype(np.float32) - centre) / spread


def _clips(frames: np.ndarray, length: int) -> np.ndarray:
    """Group frames: ``[N, 3, H, W]`` -> ``[ceil(N / length), length, 3, H, W]``, the last frame repeated."""
    short = -len(frames) % length
    whole = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    return whole.reshape(-1, length, *frames.shape[1:])


def _patchify(clips: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Cut clips into patches: ``[n, time, 3, H, W]`` -> ``[n * patches, 3 * time * patch * patch]``."""
    count, time, channels, height, width = clips.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    cells = clips.reshape(count, time, channels, rows, merge, patch, columns, merge, patch)
    # [clip, block row, block column, row in block, column in block, channel, time, pixel row, pixel column]
    cells = cells.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(cells).reshape(-1, channels * time * patch * patch)
