"""Viewing ray of every visual token of a sample: from the token's pixel in the resized frame to the frame's camera.

Only the frames' files, the scene's intrinsics and the options of pre-processing are used; no depth and no geometry
features.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from w2r2_ds.data.images import frame_size, scaled_offset, scaled_size
from w2r2_ds.data.sources.cameras import read_intrinsic
from w2r2_ds.data.sources.frame_files import INTRINSIC_FILES, intrinsic_file, scene_folder
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.types.sample import Sample


@lru_cache(maxsize=4096)
def scene_intrinsic(folder: Path) -> np.ndarray:
    """``[4, 4]`` float64 pinhole matrix of the colour images in a scene's folder, pixels; read once.

    Raises:
        ValueError: the folder has no intrinsics, or they are malformed.
    """
    return read_intrinsic(intrinsic_file(folder, INTRINSIC_FILES), "m_calibrationColorIntrinsic")


def token_points(sample: Sample, preprocessor: VisualPreprocessor, per_side: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Frame and pixels of every visual token of a sample, in the order of the vision tower.

    Args:
        sample: sample with frames.
        preprocessor: options of pre-processing.
        per_side: the points of a token are the middles of `per_side` x `per_side` equal parts of it; 1 for its centre.

    Returns:
        ``[tokens]`` int64 index of the frame; of a video, the first of the two frames that a token covers. And
        ``[tokens, per_side ** 2, 2]`` float64 pixels (x, y) in the frame's *file*, with the origin at the centre of the
        upper left pixel. They lie outside of the file if the token is on white padding.
    """
    sizes = [frame_size(path) for path in sample.frames]
    stacked, (width, height) = preprocessor.sizes(sample.frames, sizes)
    side = preprocessor.vision.patch_size * preprocessor.vision.merge_size
    # Upper left corners of the tokens in the resized frames, row by row, x varies fastest; the same for their parts.
    parts = _grid(per_side, per_side) + 0.5
    points = (_grid(width // side, height // side)[:, None] + parts / per_side) * side
    step = preprocessor.vision.temporal_patch_size if preprocessor.config.visual == "video" else 1
    frames = np.arange(0, len(sample.frames), step)
    pixels = []
    for frame in frames:
        scaled = np.array(scaled_size(sizes[frame], *preprocessor.fit))
        offset = np.array(scaled_offset(sizes[frame], stacked, *preprocessor.fit))
        # Borders are scaled to borders, and the centre of a pixel is half a pixel beside its border.
        pixels.append((points - offset) * np.array(sizes[frame]) / scaled - 0.5)
    return np.repeat(frames, len(points)), np.concatenate(pixels)


def _grid(columns: int, rows: int) -> np.ndarray:
    """``[rows * columns, 2]`` float64 integer points (x, y); x varies fastest."""
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float64)


def token_rays(sample: Sample, preprocessor: VisualPreprocessor) -> tuple[np.ndarray, np.ndarray]:
    """Frame and viewing ray of every visual token of a sample, in the order of the vision tower.

    Args:
        sample: sample with frames.
        preprocessor: options of pre-processing.

    Returns:
        ``[tokens]`` int64 index of the frame, see `token_points`; and ``[tokens, 3]`` float64 point on the ray at depth
        1 in the frame's camera (OpenCV axes).

    Raises:
        ValueError: the scene has no intrinsics, or a frame cannot be read.
    """
    frames, pixels = token_points(sample, preprocessor)
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    points = np.concatenate([pixels[:, 0], np.ones((len(pixels), 1))], axis=-1)
    return frames, points @ np.linalg.inv(intrinsic[:3, :3]).T
