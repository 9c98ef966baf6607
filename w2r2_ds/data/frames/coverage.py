"""Frame selection by greedy maximum coverage of a scene's voxels (Video-3D-LLM's ``mc`` sampling).

The voxels of a frame are those that contain a point of its depth image, back-projected to the axis-aligned world.
Differences from Video-3D-LLM: it counts only voxels that also contain a point of the scan's point cloud, which removes
stray measurements (here no point cloud is needed); it uses every second frame of long scans; and it chooses randomly
between frames that add the same number of voxels (here the first one wins).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.sources.scannet import Frame, Scene

COLUMNS = 160
"""Number of pixel columns that a depth image is subsampled to: every fourth pixel of ScanNet's 640 x 480, 2 to 3 cm
apart on a wall at 4 m."""

_BITS = 21  # per coordinate: three make one int64 voxel code


@lru_cache(maxsize=2)
def covering_frames(scene: Scene, count: int, ratio: float = 0.9, voxel: float = 0.1) -> tuple[int, ...]:
    """Ascending positions of at most ``count`` frames that cover ``ratio`` of the scene's voxels, if so few can.

    Every depth image is read once; one is in memory at a time. The results of the last two scenes are cached.

    Args:
        scene: its voxels are those of all its frames.
        count: maximum number of frames.
        ratio: fraction of the voxels at which selection stops, in (0, 1].
        voxel: edge length, metres.

    Raises:
        ValueError: a depth image is unreadable or not in millimetres, or no image of the scene has a measurement.
    """
    seen = [frame_voxels(frame, scene.depth_intrinsic, voxel) for frame in scene.frames]
    if not any(len(codes) for codes in seen):
        raise ValueError(
            f"{scene.frames[0].depth.parent}: no depth image holds a measurement, so no frame covers anything; "
            "extract the depth images again or choose frames uniformly"
        )
    return tuple(sorted(greedy_cover(seen, count, ratio)))


def frame_voxels(frame: Frame, depth_intrinsic: np.ndarray, voxel: float) -> np.ndarray:
    """Voxels of a frame's depth image: ``[n]`` int64 codes, ascending, unique. Voxel i is centred at i * voxel.

    Args:
        frame: its depth image is read.
        depth_intrinsic: ``[4, 4]``, of the depth images.
        voxel: edge length, metres.
    """
    depth = load_depth(frame)
    # Back-project every step-th pixel: K^-1 (x, y, 1) * depth in the camera, moved to the world by the pose.
    step = max(1, depth.shape[1] // COLUMNS)
    depth = depth[::step, ::step]
    rows, columns = np.nonzero(depth)
    along = depth[rows, columns] / 1000.0
    pixels = np.stack([columns * step, rows * step, np.ones(len(rows))])
    camera = np.linalg.inv(depth_intrinsic[:3, :3]) @ pixels * along
    world = frame.cam_to_world[:3, :3] @ camera + frame.cam_to_world[:3, 3:]
    cells = np.rint(world / voxel)
    if len(rows) and np.abs(cells).max() >= 1 << (_BITS - 1):
        raise ValueError(
            f"{frame.color.with_suffix('.txt')}: with this pose a measured point is {np.abs(world).max():.3g} m from "
            "the origin; extract the poses again"
        )
    # one integer per voxel, so that sets of voxels are sorted arrays of integers
    x, y, z = cells.astype(np.int64) + (1 << (_BITS - 1))
    return np.unique((x << 2 * _BITS) | (y << _BITS) | z)


def greedy_cover(seen: Sequence[np.ndarray], count: int, ratio: float) -> list[int]:
    """Greedy maximum coverage: repeatedly take the set with most new elements, the first of equal ones.

    The greedy cover has at least 1 - 1/e of the elements that the best one of as many sets has (G. Nemhauser et al.,
    "An analysis of approximations for maximizing submodular set functions", 1978).

    Args:
        seen: arrays of int64, each without repetition; not all empty.
        count: maximum number of sets.
        ratio: fraction of the union at which to stop, in (0, 1].

    Returns:
        Indices of the sets in the order in which they were taken; each adds an element.
    """
    # All sets in one array `where` of element indices; set i is where[starts[i]:ends[i]].
    elements, where = np.unique(np.concatenate(seen), return_inverse=True)
    ends = np.cumsum([len(codes) for codes in seen])
    starts = ends - [len(codes) for codes in seen]
    covered = np.zeros(len(elements), dtype=bool)
    taken: list[int] = []
    while len(taken) < count and covered.sum() / len(elements) < ratio:
        # new elements of every set at once: differences of the running number of uncovered elements
        new = np.concatenate([[0], np.cumsum(~covered[where])])
        best = int((new[ends] - new[starts]).argmax())
        covered[where[starts[best] : ends[best]]] = True
        taken.append(best)
    return taken
