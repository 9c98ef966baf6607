"""Metric lengths of a sample's frames for the scale hint: depth at the patches, or camera centres.

The geometry encoder compares them with the same lengths in its own predictions (`models/vggt/scale_hint.py`). Runs in
DataLoader workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.images import Placement
from w2r2_ds.data.sources.depth_frames import find_depth_frame, pose_file, raw_pose
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec


def load_scale_reference(
    frames: Sequence[Path],
    placements: Sequence[Placement],
    size: tuple[int, int],
    geometry: GeometrySpec,
    threads: int = 1,
) -> np.ndarray:
    """Metric lengths of the frames of a sample; arguments as of `load_point_maps`.

    Returns:
        float32, metres. With hint ``depth``, ``[frames, rows, columns]`` depth along the camera's z axis at the centre
        of every patch, NaN where none was measured. With ``poses``, ``[frames, 3]`` camera centres relative to that of
        the first frame: only their distances count.

    Raises:
        ValueError: a depth image or a pose is missing or malformed, or tracking was lost in a frame.
    """
    assert geometry.scale_hint != "none", "the encoder has no scale hint"
    if geometry.scale_hint == "depth":
        one_point = replace(geometry, point_maps=PointMapSpec(points_per_side=1, reference_frame="camera"))
        return load_point_maps(frames, placements, size, one_point, threads)[..., 0, 2]
    # Differences in float64: a world's origin may be far away.
    centres = np.stack([raw_pose(path)[:3, 3] for path in frames])
    return (centres - centres[0]).astype(np.float32)


def scale_files(frames: Sequence[Path], geometry: GeometrySpec) -> list[Path]:
    """The files of the metric lengths, one per frame: depth images or poses; empty without a scale hint.

    Raises:
        ValueError: a frame has no such file.
    """
    if geometry.scale_hint == "depth":
        return [find_depth_frame(path, with_pose=False).depth for path in frames]
    return [pose_file(path) for path in frames] if geometry.scale_hint == "poses" else []
