"""Samples whose frames have depth images, poses and intrinsics, in ScanNet's layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DEPTH_SIZE = 32, 24
HOLES = 0.1
"""Fraction of the depth pixels without measurement."""


def pinhole(size: tuple[int, int]) -> np.ndarray:
    """``[4, 4]`` intrinsics of an image of this width and height."""
    width, height = size
    return np.array([[width, 0, (width - 1) / 2, 0], [0, width, (height - 1) / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def with_depth(folder: Path, samples: Sequence[Any]) -> list[Any]:
    """Copies of the samples, each in a scene of its own below `folder`, with depths between 1.5 and 4 m."""
    found = []
    for number, sample in enumerate(samples):
        scene = f"scene{number:04d}_00"
        images, scan = folder / "posed_images" / scene, folder / "scans" / scene
        images.mkdir(parents=True)
        scan.mkdir(parents=True)
        (scan / f"{scene}.txt").write_text("axisAlignment = " + " ".join(map(str, np.eye(4).ravel())))
        rng = np.random.default_rng(number)
        frames = []
        for index, (path, pose) in enumerate(zip(sample.frames, sample.cam_to_world, strict=True)):
            frames.append(images / f"{index:05d}.jpg")
            shutil.copy(path, frames[-1])
            np.savetxt(frames[-1].with_suffix(".txt"), pose)
            depth = rng.integers(1500, 4000, DEPTH_SIZE[::-1]).astype(np.uint16)
            depth[rng.random(depth.shape) < HOLES] = 0
            Image.fromarray(depth).save(frames[-1].with_suffix(".png"))
        with Image.open(frames[0]) as image:
            np.savetxt(images / "intrinsic.txt", pinhole(image.size))
        np.savetxt(images / "depth_intrinsic.txt", pinhole(DEPTH_SIZE))
        found.append(replace(sample, scene_id=scene, frames=tuple(frames)))
    return found
