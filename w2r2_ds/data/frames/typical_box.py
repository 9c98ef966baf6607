"""Typical depth and size of the targets of a training set: all that a box at an attention anchor is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from w2r2_ds.boxes3d.transforms import corners
from w2r2_ds.data.frames.projection import project
from w2r2_ds.data.frames.token_rays import scene_intrinsic
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.types.sample import Sample


@dataclass(frozen=True)
class TypicalBox:
    """Medians over the grounding samples of a training set.

    Attributes:
        depth: distance in metres of a target's centre along the z axis of the cameras that show it.
        size: ``[3]`` float64, extent in metres of a target along the axes of the world.
        class_sizes: the same per `Target.scannet_class`.
        samples: number of samples.
    """

    depth: float
    size: np.ndarray
    class_sizes: dict[int, np.ndarray]
    samples: int

    def size_of(self, sample: Sample) -> np.ndarray:
        """Typical size of the target's class; that of all targets if no training sample had the class."""
        assert sample.target is not None, "the sample has a target"
        return self.class_sizes.get(sample.target.scannet_class, self.size)

    def describe(self) -> str:
        """One line for the log."""
        x, y, z = self.size
        return (
            f"anchors: typical depth {self.depth:.2f} m and size {x:.2f} x {y:.2f} x {z:.2f} m, medians of "
            f"{self.samples} training samples; sizes of {len(self.class_sizes)} classes"
        )


def typical_box(samples: Iterable[Sample]) -> TypicalBox:
    """Typical depth and size of the targets of the grounding samples.

    The depth of a sample is the median over the frames whose image contains the projected centre of its box. Whether
    another object hides it is ignored. Samples whose centre is in no frame count for the sizes only.

    Raises:
        ValueError: no grounding sample has a target in a frame, or a scene has no intrinsics.
    """
    depths: list[float] = []
    sizes: dict[int, list[np.ndarray]] = defaultdict(list)
    for sample in samples:
        if not sample.frames:
            continue
        scene_intrinsic(scene_folder(sample.frames[0]))  # the rays of captions need it too: raise the error here
        if sample.kind != "grounding" or sample.target is None:
            continue
        points = corners(sample.target.box)
        sizes[sample.target.scannet_class].append(points.max(0) - points.min(0))
        depth = depths_in_view(sample.target.box[:3], sample)
        if len(depth):
            depths.append(float(np.median(depth)))
    if not depths:
        raise ValueError(
            "data.train: no grounding sample has its target in a frame with a camera pose, but "
            "objective.shortcut_decode anchor and attention anchors need the typical depth and size of targets; add a "
            "set such as scanrefer in format vgllm (format video3dllm has no poses), or choose teacher."
        )
    every = np.concatenate([np.stack(found) for found in sizes.values()])
    by_class = {index: np.median(found, axis=0) for index, found in sorted(sizes.items())}
    return TypicalBox(float(np.median(depths)), np.median(every, axis=0), by_class, len(every))


def depths_in_view(point: np.ndarray, sample: Sample) -> np.ndarray:
    """Depths in metres of a world point ``[3]`` in those frames of a sample whose image contains it."""
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    # The principal point is near the middle of an image (checked by `prepare.py`), so twice its coordinates are the
    # size; the headers of all image files are not read.
    width, height = 2 * intrinsic[0, 2], 2 * intrinsic[1, 2]
    depths = []
    for pose in sample.cam_to_world:
        ((x, y),), (depth,) = project(point[None], pose, intrinsic)
        if depth > 0 and 0 <= x <= width and 0 <= y <= height:
            depths.append(depth)
    return np.array(depths)
