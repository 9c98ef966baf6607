"""Reader of a scene's frames: which of them can be used, their poses, and the sizes of their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial
from pathlib import Path

import numpy as np

from w2r2_ds.data.images import THREADS, check_frame
from w2r2_ds.data.sources.cameras import check_extent, depth_size, is_marked_lost, read_pose, read_text
from w2r2_ds.data.sources.frame_files import FrameFiles, find_frames
from w2r2_ds.utils.findings import Finding

NOT_READ = np.full((4, 4), np.nan)
"""Matrix in place of a file that was not read."""
MAX_LOST = 0.5
"""Largest fraction of a scene's frames that may lack a file or have an unreadable image."""
LOST_POSE = "frames without a valid pose (nan or inf)"
IDENTITY_POSE = "frames with the same pose, the identity"


class SceneParts(Flag):
    """Files of a scene besides its colour images. A task declares those that it needs; no others are read."""

    NONE = 0
    POSES = auto()
    """The pose of every frame, and the scan's ``axisAlignment``."""
    INTRINSICS = auto()
    """``intrinsic.txt``."""
    DEPTH = auto()
    """The depth image of every frame, and ``depth_intrinsic.txt``."""
    BOXES = auto()
    """``SCENE_aligned_bbox.npy``."""


@dataclass(frozen=True)
class Frame:
    """One posed image.

    Attributes:
        index: frame number in the file names.
        color: RGB image file.
        depth: depth image file, uint16 PNG, millimetres along the camera's z axis; 0 means no measurement. It may be
            missing if the scene was read without ``DEPTH``.
        cam_to_world: ``[4, 4]`` float64, OpenCV camera to *axis-aligned* world (``axis_align @ pose``), metres; NaN if
            the scene was read without ``POSES``.
    """

    index: int
    color: Path
    depth: Path
    cam_to_world: np.ndarray


@dataclass(frozen=True)
class Frames:
    """Frames of a scene, with poses in the *raw* world.

    Attributes:
        frames: usable frames, by ascending frame number.
        lost: frames that were skipped.
        color_size: a colour image, and the width and height of all colour images; None if they were not compared.
        depth_size: the same of the depth images.
    """

    frames: tuple[Frame, ...]
    lost: tuple[Finding, ...]
    color_size: tuple[Path, tuple[int, int]] | None
    depth_size: tuple[Path, tuple[int, int]] | None


def read_frames(folder: Path, parts: SceneParts) -> Frames:
    """Read the frames of a scene's folder; lost frames are skipped and counted.

    Raises:
        ValueError: a pose is malformed, not rigid or not in metres, images differ in size although their intrinsics are
            needed, no frame can be used, or more than ``MAX_LOST`` of them lack a file or cannot be read.
    """
    found = find_frames(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        checked = list(pool.map(partial(_check_files, folder, parts), found))
    poses = {files.index: _pose(files, parts) for files, each in zip(found, checked, strict=True) if not each.lost}
    # A tracker may write the identity for lost frames. One frame may have it: the first camera as the world.
    identities = Counter(pose is not None and np.array_equal(pose, np.eye(4)) for pose in poses.values())[True]
    frames, lost, sizes = [], [], []
    for files, each in zip(found, checked, strict=True):
        pose = poses.get(files.index)
        if each.lost:
            lost.append(Finding(each.lost, each.example))
        elif pose is None:
            lost.append(Finding(LOST_POSE, str(files.pose)))
        elif identities > 1 and np.array_equal(pose, np.eye(4)):
            lost.append(Finding(IDENTITY_POSE, str(files.pose)))
        else:
            assert files.color is not None
            frames.append(Frame(files.index, files.color, files.depth or files.color.with_suffix(".png"), pose))
            sizes.append(each)
    _check_lost(folder, frames, lost)
    if SceneParts.POSES in parts:
        check_extent(folder, [frame.cam_to_world for frame in frames])
    return Frames(
        frames=tuple(frames),
        lost=tuple(lost),
        color_size=_one_size([each.color for each in sizes]) if SceneParts.INTRINSICS in parts else None,
        depth_size=_one_size([each.depth for each in sizes]) if SceneParts.DEPTH in parts else None,
    )


@dataclass(frozen=True)
class _Checked:
    """Result of `_check_files`: why the frame is lost, with an example; or its images and their sizes."""

    lost: str = ""
    example: str = ""
    color: tuple[Path, tuple[int, int]] | None = None
    depth: tuple[Path, tuple[int, int]] | None = None


def _check_files(folder: Path, parts: SceneParts, files: FrameFiles) -> _Checked:
    """Whether the files of a frame exist and its images can be read."""
    for path, content, is_needed in (
        (files.color, "colour image", True),
        (files.pose, "pose file", SceneParts.POSES in parts),
        (files.depth, "depth image", SceneParts.DEPTH in parts),
    ):
        if is_needed and path is None:
            return _Checked(f"frames without a {content}", f"{folder}: frame {files.index}")
    assert files.color is not None
    try:
        color = files.color, check_frame(files.color)
    except ValueError as error:
        return _Checked("frames whose colour image cannot be read", str(error))
    if SceneParts.DEPTH not in parts:
        return _Checked(color=color)
    assert files.depth is not None
    try:
        return _Checked(color=color, depth=(files.depth, depth_size(files.depth)))
    except ValueError as error:
        return _Checked("frames whose depth image cannot be read", str(error))


def _pose(files: FrameFiles, parts: SceneParts) -> np.ndarray | None:
    """The pose of a frame, None if it is lost; ``NOT_READ`` without ``POSES``."""
    if SceneParts.POSES in parts:
        assert files.pose is not None
        pose = read_pose(files.pose)
        return pose if np.isfinite(pose).all() else None
    is_lost = files.pose is not None and is_marked_lost(read_text(files.pose, "a camera pose"))
    return None if is_lost else NOT_READ


def _check_lost(folder: Path, frames: Sequence[Frame], lost: Sequence[Finding]) -> None:
    """Raise ``ValueError`` if no frame can be used, or if too many lack a file or cannot be read."""
    kinds = Counter(finding.kind for finding in lost)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if not frames:
        raise ValueError(f"{folder} has no frame that can be used ({counts}); extract the scene's frames again")
    # A tracker may lose the camera for long, and poses of all frames may exist beside every tenth image.
    expected = (LOST_POSE, IDENTITY_POSE, "frames without a colour image")
    damaged = [finding for finding in lost if finding.kind not in expected]
    if len(damaged) > MAX_LOST * (len(frames) + len(damaged)):
        raise ValueError(
            f"{folder}: most frames cannot be used ({counts}, such as {damaged[0].example}); extract them again"
        )


def _one_size(sizes: Sequence[tuple[Path, tuple[int, int]] | None]) -> tuple[Path, tuple[int, int]] | None:
    """An image and the common size of all; raises ``ValueError`` with two images of different sizes.

    One file of intrinsics belongs to one size.
    """
    known = [size for size in sizes if size is not None]
    for path, size in known:
        first, expected = known[0]
        if size != expected:
            raise ValueError(
                f"{path} has {size[0]} x {size[1]} pixels, but {first.name} {expected[0]} x {expected[1]}; the "
                "intrinsics of a scene belong to one size, so extract the images again"
            )
    return known[0] if known else None
