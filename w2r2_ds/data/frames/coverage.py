"""Frame selection by greedy maximum coverage of a scene's voxels (Video-3D-LLM's ``mc`` sampling).

The voxels of a frame are those that contain a point of its depth image, back-projected to the axis-aligned world.
Differences from Video-3D-LLM:

* It counts only voxels that also contain a point of the scan's point cloud, which removes stray measurements. Here no
  point cloud is needed.
* It uses every second frame of long scans. Here all frames are used.
* It chooses randomly between frames that add the same number of voxels. Here the first of them is selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.scannet import Scene

COLUMNS = 160
"""Number of pixel columns to which a depth image is subsampled: every fourth pixel of ScanNet's 640 x 480, 2 to 3 cm
apart on a wall at a distance of 4 m."""

_BITS = 21  # bits per coordinate; three coordinates fit into one int64 voxel code


@lru_cache(maxsize=2)
def covering_frames(scene: Scene, count: int, ratio: float = 0.9, voxel: float = 0.1) -> tuple[int, ...]:
    """Select frames greedily until they cover ``ratio`` of the scene's voxels; at most ``count`` frames.

    Every depth image is read once; one is in memory at a time. The results of the last two scenes are cached.

    Args:
        scene: scene with depth images; its voxels are those of all its frames.
        count: maximum number of frames.
        ratio: fraction of the voxels at which selection stops, in (0, 1].
        voxel: edge length of a voxel, metres.

    Returns:
        Positions in ``scene.frames``, ascending.

    Raises:
        ValueError: a depth image is unreadable or not in millimetres, or no image of the scene has a measurement.
    """
    voxels = [frame_voxels(frame, scene.depth_intrinsic, voxel) for frame in scene.frames]
    if not any(len(codes) for codes in voxels):
        raise ValueError(
            f"{scene.frames[0].depth.parent}: no depth image holds a measurement, so no frame covers anything; "
            "extract the depth images again or choose frames uniformly"
        )
    return tuple(sorted(greedy_cover(voxels, count, ratio)))


def frame_voxels(frame: Frame, depth_intrinsic: np.ndarray, voxel: float) -> np.ndarray:
    """Codes of the voxels that contain a point of a frame's depth image, ``[n]`` int64, ascending and unique.

    The voxel with index i along an axis is centred at ``i * voxel`` in the axis-aligned world.

    Args:
        frame: frame whose depth image is read.
        depth_intrinsic: ``[4, 4]`` pinhole matrix of the depth images, pixels.
        voxel: edge length of a voxel, metres.

    Raises:
        ValueError: the depth image is unreadable or not in millimetres, or a point is too far from the origin.
    """
    depth = load_depth(frame)
    # Back-project every step-th pixel: K^-1 (x, y, 1) * depth in the camera, moved to the world by the pose.
    step = max(1, depth.shape[1] // COLUMNS)
    depth = depth[::step, ::step]
    rows, columns = np.nonzero(depth)
    metres = depth[rows, columns] / 1000.0
    pixels = np.stack([columns * step, rows * step, np.ones(len(rows))])
    camera = np.linalg.inv(depth_intrinsic[:3, :3]) @ pixels * metres
    world = frame.cam_to_world[:3, :3] @ camera + frame.cam_to_world[:3, 3:]
    cells = np.rint(world / voxel)
    if len(rows) and np.abs(cells).max() >= 1 << (_BITS - 1):
        raise ValueError(
            f"{frame.color.with_suffix('.txt')}: with this pose a measured point is {np.abs(world).max():.3g} m from "
            "the origin; extract the poses again"
        )
    # One integer per voxel, so that a set of voxels is a sorted array of integers. The offset makes the coordinates
    # non-negative, as the shifts require.
    x, y, z = cells.astype(np.int64) + (1 << (_BITS - 1))
    return np.unique((x << 2 * _BITS) | (y << _BITS) | z)


def greedy_cover(sets: Sequence[np.ndarray], count: int, ratio: float) -> list[int]:
    """Greedy maximum coverage: repeatedly take the set with the most new elements; of equal sets, the first.

    A greedy cover has at least 1 - 1/e of the elements of the best cover with as many sets (G. Nemhauser et al., "An
    analysis of approximations for maximizing submodular set functions", 1978).

    Args:
        sets: arrays of int64, each without repetition; not all empty.
        count: maximum number of sets to take.
        ratio: fraction of the union of all sets at which to stop, in (0, 1].

    Returns:
        Indices of the sets in the order in which they were taken; each adds at least one element.
    """
    # Concatenate all sets as indices into the union: set i is members[starts[i]:ends[i]].
    union, members = np.unique(np.concatenate(sets), return_inverse=True)
    ends = np.cumsum([len(elements) for elements in sets])
    starts = ends - [len(elements) for elements in sets]
    covered = np.zeros(len(union), dtype=bool)
    taken: list[int] = []
    while len(taken) < count and covered.sum() / len(union) < ratio:
        # Count the new elements of all sets at once, as differences of a running count of uncovered members.
        running = np.concatenate([[0], np.cumsum(~covered[members])])
        best = int((running[ends] - running[starts]).argmax())
        covered[members[starts[best] : ends[best]]] = True
        taken.append(best)
    return taken
