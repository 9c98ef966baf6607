"""Which visual tokens show the target of a sample: the share of every token that the projected box covers."""

from __future__ import annotations

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from w2r2_ds.data.frames.projection import clipped_corners
from w2r2_ds.data.frames.token_rays import scene_intrinsic, token_points
from w2r2_ds.data.images import frame_size
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.types.sample import Sample

PER_SIDE = 4
"""A token is sampled at PER_SIDE x PER_SIDE points."""


def target_coverage(sample: Sample, preprocessor: VisualPreprocessor) -> np.ndarray:
    """Share of every visual token that lies in the projected box of the target.

    The mask is the convex hull of the box's projected corners. It is somewhat larger than the object, and objects in
    front of the target are ignored.

    Args:
        sample: sample with frames, poses and a target.
        preprocessor: options of pre-processing.

    Returns:
        ``[tokens]`` float64 in [0, 1], in the order of the vision tower. Tokens of frames without a pose have 0.

    Raises:
        ValueError: the scene has no intrinsics, or a frame cannot be read.
    """
    assert sample.target is not None, "the sample has a target"
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    frames, points = token_points(sample, preprocessor, PER_SIDE)
    coverage = np.zeros(len(frames))
    for frame in np.unique(frames):
        pose = sample.cam_to_world[frame]
        if np.isfinite(pose).all():
            corners = clipped_corners(sample.target.box, pose, intrinsic, frame_size(sample.frames[frame]))
            own = frames == frame
            coverage[own] = in_hull(points[own].reshape(-1, 2), corners).reshape(-1, PER_SIDE**2).mean(1)
    return coverage


def in_hull(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """``[n]`` bool: which of the points ``[n, 2]`` are in the convex hull of corners ``[k, 2]``; none without area."""
    hull = _hull(corners)
    if hull is None:
        return np.zeros(len(points), dtype=bool)
    # [edges, 3]: outward normal and offset
    inside: np.ndarray = (points @ hull.equations[:, :2].T + hull.equations[:, 2] <= 0).all(-1)
    return inside


def hull_outline(corners: np.ndarray) -> np.ndarray:
    """The convex hull of corners ``[k, 2]`` as a polygon ``[m, 2]``; empty if it has no area."""
    hull = _hull(corners)
    return np.zeros((0, 2)) if hull is None else corners[hull.vertices]


def _hull(corners: np.ndarray) -> ConvexHull | None:
    """Convex hull of corners ``[k, 2]``; None if it has no area."""
    if len(corners) < 3:
        return None
    try:
        return ConvexHull(corners)
    except QhullError:  # all on one line: the box is beside the image and was clipped to its border
        return None
