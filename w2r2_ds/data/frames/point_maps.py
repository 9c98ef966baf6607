"""Point maps of resized frames: 3D points of every patch, from depth images and cameras; runs in DataLoader workers.

Every patch has k x k positions, at the centres of k x k equal parts. A position is a viewing ray of the colour camera.
The point is that of the depth pixel which the ray meets: a measured surface point, not interpolated, because the mean
of two depths at the border of an object lies on neither surface. It deviates from the ray by half a depth pixel at
most, in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from w2r2_ds.data.frames.projection import read_depth
from w2r2_ds.data.images import Placement
from w2r2_ds.data.sources.depth_frames import DepthFrame, find_depth_frame
from w2r2_ds.types.geometry import GeometrySpec


def load_point_maps(
    frames: Sequence[Path],
    placements: Sequence[Placement],
    size: tuple[int, int],
    geometry: GeometrySpec,
    threads: int = 1,
) -> np.ndarray:
    """Point maps of the frames of a sample.

    Args:
        frames: colour images, each beside its depth image and pose (`data/sources/frame_files.py`).
        placements: per frame, where the resized frame shows the colour image.
        size: width and height in pixels of the resized frames, multiples of the patch size.
        geometry: patch size, points per patch and coordinate system.
        threads: number of depth images that are decoded at once.

    Returns:
        ``[frames, rows, columns, k * k, 3]`` float32, metres; NaN where no depth was measured: depth 0, outside the
        depth image, or in the padding of a frame.

    Raises:
        ValueError: a file is missing, cannot be read or has implausible values.
    """
    spec = geometry.point_maps
    assert spec is not None, "the encoder needs images"
    found = [find_depth_frame(path, spec.needs_poses) for path in frames]
    positions = patch_positions(size, geometry)

    def points(index: int) -> np.ndarray:
        """Points of one frame in its camera."""
        pixels = placements[index].to_original(positions)
        return camera_points(pixels, placements[index].size, read_depth(found[index].depth), found[index])

    # Pillow releases Python's global lock while it decodes.
    with ThreadPoolExecutor(min(threads, len(frames))) as pool:
        in_cameras = list(pool.map(points, range(len(frames))))
    transforms = reference_transforms([frame.cam_to_world for frame in found], spec.reference_frame)
    result = np.empty(geometry.point_map_shape(len(frames), size[1], size[0]), dtype=np.float32)
    for index, (each, transform) in enumerate(zip(in_cameras, transforms, strict=True)):
        result[index] = each @ transform[:3, :3].T + transform[:3, 3]
    return result


def patch_positions(size: tuple[int, int], geometry: GeometrySpec) -> np.ndarray:
    """Positions of the points in a resized frame.

    Returns:
        ``[rows, columns, k * k, 2]`` float64 (x, y), in pixels from the frame's upper left corner, so that the centre
        of the first pixel is (0.5, 0.5); row by row within a patch.
    """
    assert geometry.point_maps is not None, "the encoder needs images"
    k, patch = geometry.point_maps.points_per_side, geometry.patch_size
    rows, columns = geometry.grid(size[1], size[0])
    x, y = ((np.arange(count * k) + 0.5) * (patch / k) for count in (columns, rows))
    dense = np.stack(np.meshgrid(x, y), axis=-1)  # [rows * k, columns * k, 2]
    return dense.reshape(rows, k, columns, k, 2).swapaxes(1, 2).reshape(rows, columns, k * k, 2)


def camera_points(pixels: np.ndarray, size: tuple[int, int], depth: np.ndarray, frame: DepthFrame) -> np.ndarray:
    """Measured points at pixels of a colour image, in the camera's coordinates.

    Args:
        pixels: ``[..., 2]`` float64 (x, y); the centre of the upper left pixel is (0, 0).
        size: width and height of the colour image, pixels.
        depth: ``[height, width]`` uint16 depth image, millimetres.
        frame: intrinsics of both images.

    Returns:
        ``[..., 3]`` float64, metres, OpenCV axes; NaN where no depth was measured.
    """
    in_image = ((pixels >= -0.5) & (pixels <= np.array(size) - 0.5)).all(axis=-1)
    rays = homogeneous(pixels) @ np.linalg.inv(frame.intrinsic).T
    nearest = np.rint((rays @ frame.depth_intrinsic.T)[..., :2])  # the depth pixel that each ray meets
    height, width = depth.shape
    in_depth = ((nearest >= 0) & (nearest < (width, height))).all(axis=-1)
    shown = in_image & in_depth
    columns, rows = np.moveaxis(np.where(shown[..., None], nearest, 0).astype(int), -1, 0)
    metres = np.where(shown & (depth[rows, columns] > 0), depth[rows, columns] / 1000.0, np.nan)
    # Back to 3D along the ray of the depth pixel, which has z = 1 in the camera.
    return metres[..., None] * (homogeneous(nearest) @ np.linalg.inv(frame.depth_intrinsic).T)


def homogeneous(pixels: np.ndarray) -> np.ndarray:
    """``[..., 2]`` (x, y) -> ``[..., 3]`` (x, y, 1)."""
    return np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1)


def reference_transforms(poses: Sequence[np.ndarray], reference_frame: str) -> list[np.ndarray]:
    """Per frame, ``[4, 4]`` float64 from its camera to the coordinate system of the points.

    Args:
        poses: per frame, ``[4, 4]`` camera to axis-aligned world; not used for ``camera``.
        reference_frame: see `PointMapSpec`.
    """
    if reference_frame == "camera":
        return [np.eye(4)] * len(poses)
    if reference_frame == "world":
        return list(poses)
    origin = np.linalg.inv({"first": poses[0], "last": poses[-1]}[reference_frame])
    return [origin @ pose for pose in poses]
