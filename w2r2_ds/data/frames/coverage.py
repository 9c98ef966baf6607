"""Which few frames see most of a scene: greedy maximum coverage of voxels (Video-3D-LLM's ``mc`` sampling).

The voxels of a frame are those in which its depth image, moved to the world, has a point. Three things differ from
Video-3D-LLM: it counts only voxels that also hold a point of the scan's point cloud (which removes stray measurements;
here no point cloud is needed), it looks at every second frame of a long scan only, and it lets chance decide between
frames that add equally many voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from w2r2_ds.data.frames.projection import load_depth
from w2r2_ds.data.sources.scannet import Frame, Scene

COLUMNS = 160
"""A depth image is read on a pixel grid of about so many columns: every fourth pixel of ScanNet's 640 x 480, which are
2 to 3 cm apart on a wall 4 m away."""

_BITS = 21


@lru_cache(maxsize=2)
def covering_frames(scene: Scene, count: int, ratio: float = 0.9, voxel: float = 0.1) -> tuple[int, ...]:
    """At most ``count`` positions, ascending, that see ``ratio`` of the scene's voxels if so few frames can.

    Every depth image is read once, one at a time; the answer for a scene is remembered until two others were asked for.

    Args:
        scene: its voxels are those that any of its frames sees.
        count: most frames.
        ratio: share of the voxels at which no more frames are taken, in (0, 1].
        voxel: edge length, metres.

    Raises:
        ValueError: a depth image is unreadable or of a wrong scale, or none of the scene's holds a measurement.
    """
    seen = [frame_voxels(frame, scene.depth_intrinsic, voxel) for frame in scene.frames]
    if not any(len(codes) for codes in seen):
        raise ValueError(
            f"{scene.frames[0].depth.parent}: no depth image holds a measurement, so no frame covers anything; "
            "extract the depth images again or choose frames uniformly"
        )
    return tuple(sorted(greedy_cover(seen, count, ratio)))


def frame_voxels(frame: Frame, depth_intrinsic: np.ndarray, voxel: float) -> np.ndarray:
    """The voxels a frame sees: ``[n]`` int64 codes, ascending, each once. Voxel i holds coordinates around i * voxel.

    Args:
        frame: its depth image is read.
        depth_intrinsic: ``[4, 4]``, of the depth images.
        voxel: edge length, metres.
    """
    depth = load_depth(frame)
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
            f"{frame.color.with_suffix('.txt')}: the pose puts what the frame sees {np.abs(world).max():.3g} m away; "
            "extract the poses again"
        )
    x, y, z = cells.astype(np.int64) + (1 << (_BITS - 1))
    return np.unique((x << 2 * _BITS) | (y << _BITS) | z)


def greedy_cover(seen: Sequence[np.ndarray], count: int, ratio: float) -> list[int]:
    """Take, again and again, the set with most new elements (the earliest of equal ones).

    Args:
        seen: arrays of int64, each without repetition; together not empty.
        count: most sets to take.
        ratio: share of the union at which to stop, in (0, 1].

    Returns:
        indices of the sets, in the order in which they were taken; none of them adds nothing.
    """
    elements, where = np.unique(np.concatenate(seen), return_inverse=True)
    ends = np.cumsum([len(codes) for codes in seen])
    starts = ends - [len(codes) for codes in seen]
    covered = np.zeros(len(elements), dtype=bool)
    taken: list[int] = []
    while len(taken) < count and covered.sum() / len(elements) < ratio:
        new = np.concatenate([[0], np.cumsum(~covered[where])])
        best = int((new[ends] - new[starts]).argmax())
        covered[where[starts[best] : ends[best]]] = True
        taken.append(best)
    return taken
