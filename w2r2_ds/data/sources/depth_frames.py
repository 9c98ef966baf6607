"""Find depth image, intrinsics and pose of a colour frame of a scene, for point maps and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from w2r2_ds.data.images import frame_size
from w2r2_ds.data.sources.cameras import (
    check_principal_point,
    depth_size,
    read_alignment,
    read_intrinsic,
    read_pose,
)
from w2r2_ds.data.sources.frame_files import (
    DEPTH_INTRINSIC_FILES,
    INTRINSIC_FILES,
    FrameFiles,
    find_frames,
    intrinsic_file,
    scene_folder,
)
from w2r2_ds.data.sources.frames import NOT_READ
from w2r2_ds.data.sources.scannet import alignment_file

CACHED_SCENES = 16
"""Scenes whose list of files a process keeps in memory; consecutive samples are often from one scene."""


@dataclass(frozen=True, eq=False)
class DepthFrame:
    """Depth image and cameras of a colour frame.

    Colour and depth camera have the same pose and differ in their intrinsics, as in ScanNet.

    Attributes:
        depth: depth image, uint16, millimetres along the camera's z axis; 0 where nothing was measured.
        intrinsic: ``[3, 3]`` float64 pinhole matrix of the colour image, pixels.
        depth_intrinsic: the same of the depth image.
        cam_to_world: ``[4, 4]`` float64, OpenCV camera to axis-aligned world, metres; NaN if poses are not needed.
    """

    depth: Path
    intrinsic: np.ndarray
    depth_intrinsic: np.ndarray
    cam_to_world: np.ndarray


@dataclass(frozen=True, eq=False)
class _SceneFiles:
    """Files and intrinsics of a scene, by colour image."""

    frames: dict[Path, FrameFiles]
    intrinsic_file: Path
    depth_intrinsic_file: Path
    intrinsic: np.ndarray
    depth_intrinsic: np.ndarray


def find_depth_frame(color: Path, with_pose: bool) -> DepthFrame:
    """Depth image and cameras of a colour frame, by the layouts of `frame_files.py`; the depth image is not opened.

    Args:
        color: colour image in a scene's folder ``posed_images/SCENE``.
        with_pose: whether to read the camera pose.

    Raises:
        ValueError: a file is missing or malformed, or tracking was lost in the frame.
    """
    folder = scene_folder(color)
    scene = _scene_files(folder)
    files = scene.frames.get(color)
    if files is None:
        raise ValueError(f"{color} is no frame of {folder}; extract the scene's frames again")
    if files.depth is None:
        raise ValueError(f"{color} has no depth image in {folder}; extract the scene's depth images")
    pose = frame_pose(color) if with_pose else NOT_READ
    return DepthFrame(files.depth, scene.intrinsic, scene.depth_intrinsic, pose)


def frame_pose(color: Path) -> np.ndarray:
    """``[4, 4]`` float64, OpenCV camera of a colour image to axis-aligned world, metres.

    Raises:
        ValueError: the pose is missing or malformed, or tracking was lost in the frame.
    """
    pose = raw_pose(color)
    return _alignment(scene_folder(color)) @ pose


def raw_pose(color: Path) -> np.ndarray:
    """As `frame_pose`, camera to the world of the pose files, which need not be axis-aligned."""
    file = pose_file(color)
    pose = read_pose(file)
    if not np.isfinite(pose).all():
        raise ValueError(f"{file} marks lost tracking (nan or inf); prepare the data set without this frame")
    return pose


def pose_file(color: Path) -> Path:
    """Text file of the camera pose of a colour image.

    Raises:
        ValueError: there is none.
    """
    folder = scene_folder(color)
    files = _frame_files(folder).get(color)
    if files is None or files.pose is None:
        raise ValueError(f"{color} has no camera pose in {folder}; extract the scene's poses")
    return files.pose


def check_depth_frame(color: Path, with_pose: bool) -> None:
    """Check that a point map of a colour frame can be computed, without decoding its images.

    Raises:
        ValueError: as `find_depth_frame`, the depth image is not readable, or intrinsics belong to another image size.
    """
    frame, scene = find_depth_frame(color, with_pose), _scene_files(scene_folder(color))
    check_principal_point(scene.intrinsic_file, frame.intrinsic, color, frame_size(color))
    check_principal_point(scene.depth_intrinsic_file, frame.depth_intrinsic, frame.depth, depth_size(frame.depth))


@lru_cache(CACHED_SCENES)
def _frame_files(folder: Path) -> dict[Path, FrameFiles]:
    """Files of the frames in a scene's folder, by colour image."""
    return {files.color: files for files in find_frames(folder) if files.color is not None}


@lru_cache(CACHED_SCENES)
def _scene_files(folder: Path) -> _SceneFiles:
    color, depth = intrinsic_file(folder, INTRINSIC_FILES), intrinsic_file(folder, DEPTH_INTRINSIC_FILES)
    return _SceneFiles(
        frames=_frame_files(folder),
        intrinsic_file=color,
        depth_intrinsic_file=depth,
        intrinsic=read_intrinsic(color, "m_calibrationColorIntrinsic")[:3, :3],
        depth_intrinsic=read_intrinsic(depth, "m_calibrationDepthIntrinsic")[:3, :3],
    )


@lru_cache(CACHED_SCENES)
def _alignment(folder: Path) -> np.ndarray:
    """``[4, 4]`` raw to axis-aligned world; the identity for a scan without alignment, as for poses of samples."""
    return read_alignment(alignment_file(folder.parent.parent, folder.name), required=False)
