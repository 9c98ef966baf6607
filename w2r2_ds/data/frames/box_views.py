"""Poses of a sample's frames, and the frames in which a box is shown, for pictures of boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from w2r2_ds.data.frames.projection import projected_area
from w2r2_ds.data.images import frame_size
from w2r2_ds.data.sources.depth_frames import frame_pose
from w2r2_ds.types.sample import Sample


def with_poses(sample: Sample) -> Sample:
    """The sample with the poses of its frames, which are read if its task needs none (NaN), as with world boxes.

    Raises:
        ValueError: a pose is missing or malformed.
    """
    if np.isfinite(sample.cam_to_world).all():
        return sample
    return replace(sample, cam_to_world=np.stack([frame_pose(frame) for frame in sample.frames]))


def frames_to_show(sample: Sample, box: np.ndarray | None, intrinsic: np.ndarray | None, count: int) -> list[int]:
    """Indices of the frames in which a box is largest, in ascending order; evenly spaced ones if it is in none.

    Args:
        sample: sample with frames.
        box: world box ``[6]`` or ``[9]``; None without one.
        intrinsic: ``[4, 4]`` pinhole matrix of the frames; None if it is not known.
        count: most frames.

    Raises:
        ValueError: a frame cannot be read.
    """
    frames = len(sample.frames)
    areas: list[float] = []
    if box is not None and intrinsic is not None:
        size = frame_size(sample.frames[0])
        areas = [projected_area(box, pose, intrinsic, size) for pose in sample.cam_to_world]
    if not any(areas):
        return sorted({round(index) for index in np.linspace(0, frames - 1, min(count, frames))})
    largest = sorted(range(frames), key=lambda index: -areas[index])[:count]
    return sorted(index for index in largest if areas[index])
