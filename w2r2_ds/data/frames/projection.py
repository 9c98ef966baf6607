"""Projection of a box into one posed frame: its pixels, its area, and the fraction of it that is not occluded.

World: axis-aligned, +z up, metres. Camera: OpenCV (x right, y down, z forward). Pixels: (x, y) from the centre of the
upper left pixel. Depth images hold the distance along the camera's z axis.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull, QhullError

from w2r2_ds.boxes3d.transforms import corners, rotation_matrix
from w2r2_ds.data.sources.scannet import Frame

OCCLUSION_MARGIN = 0.1
"""Metres by which the measured surface may lie before or behind the box and still be the object's."""

MIN_VISIBLE_FRACTION = 0.2
"""Smallest `visible_fraction` at which an object counts as visible in a frame."""

DEPTH_RANGE = (0.1, 20.0)
"""Range, in metres, of the median depth of an image of a room in millimetres."""

_NEAR = 1e-6  # metres; points closer to the camera's plane have no projection
# 6 x 6 x 6 points in the unit cube, 5 % inside its faces: a surface on the face is not missed by rounding
_GRID = np.stack(np.meshgrid(*[np.linspace(-0.45, 0.45, 6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
_CORNERS = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


def load_depth(frame: Frame) -> np.ndarray:
    """Read a frame's depth image: ``[height, width]`` uint16, millimetres, 0 where nothing was measured.

    Raises:
        ValueError: the file is unreadable, not a 16-bit one-channel PNG, or not in millimetres.
    """
    try:
        with Image.open(frame.depth, formats=["PNG"]) as image:
            depth = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{frame.depth} is not a readable depth image; extract it again ({error})") from None
    if depth.ndim != 2 or depth.dtype.kind not in "iu" or depth.dtype.itemsize < 2:
        raise ValueError(f"{frame.depth} is not a 16-bit one-channel depth image; extract it again")
    _check_scale(depth, frame)
    return depth.astype(np.uint16)


def _check_scale(depth: np.ndarray, frame: Frame) -> None:
    """Raise ``ValueError`` if the median depth is outside ``DEPTH_RANGE``: the unit is then not millimetres.

    The median is that of every fourth pixel in both directions. An image without measurements passes.
    """
    measured = depth[::4, ::4]
    measured = measured[measured != 0]
    if not measured.size:
        return
    median = float(np.median(measured)) / 1000.0
    if not DEPTH_RANGE[0] <= median <= DEPTH_RANGE[1]:
        raise ValueError(
            f"{frame.depth}: read as millimetres, the median depth is {median:g} m, which no room has; "
            "ScanNet's depth images hold millimetres as uint16, so convert these images to that scale"
        )


def box_corners(box: np.ndarray) -> np.ndarray:
    """Corners of an axis-aligned box ``[6]`` (centre, size): ``[8, 3]`` float64, x slowest, z fastest."""
    return np.asarray(box[:3]) + _CORNERS * np.asarray(box[3:6])


def project(points: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project points with a pinhole camera.

    Args:
        points: ``[N, 3]`` world, metres.
        cam_to_world: ``[4, 4]``.
        intrinsic: ``[4, 4]`` or ``[3, 3]``, pixels.

    Returns:
        Pixels ``[N, 2]`` (x, y), not defined for points behind the camera, and depths ``[N]`` along z, metres.
    """
    # world to camera: R^-1 (p - t), for rows of points
    camera = (points - cam_to_world[:3, 3]) @ np.linalg.inv(cam_to_world[:3, :3]).T
    depth = camera[:, 2]
    safe = np.where(np.abs(depth) < _NEAR, _NEAR, depth)
    image = camera @ intrinsic[:3, :3].T
    return image[:, :2] / safe[:, None], depth


def projected_area(
    box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]
) -> float:
    """Area, in square pixels, of the convex hull of a box's corners in an image.

    Corners behind the camera are not used and the others are clipped to the image; the area is 0 if fewer than three
    remain or the camera is inside the box.

    Args:
        box: ``[6]`` (axis-aligned) or ``[9]`` (see ``boxes3d/transforms.py``), world, metres.
        cam_to_world: ``[4, 4]``.
        intrinsic: ``[4, 4]`` or ``[3, 3]``, pixels.
        image_size: width and height, pixels.
    """
    return hull_area(clipped_corners(box, cam_to_world, intrinsic, image_size))


def clipped_corners(
    box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """Pixels ``[k, 2]`` of the corners before the camera, clipped to the image; none if the camera is in the box.

    Args:
        box: ``[6]`` (axis-aligned) or ``[9]`` (see ``boxes3d/transforms.py``), world, metres.
        cam_to_world: ``[4, 4]``.
        intrinsic: ``[4, 4]`` or ``[3, 3]``, pixels.
        image_size: width and height, pixels.
    """
    offset, points = cam_to_world[:3, 3] - box[:3], box_corners(box[:6])
    if len(box) == 9:  # the camera in the axes of the box
        offset, points = rotation_matrix(box[6:]).T @ offset, corners(box)
    if (np.abs(offset) <= np.asarray(box[3:6]) / 2).all():
        return np.empty((0, 2))
    pixels, depth = project(points, cam_to_world, intrinsic)
    return np.clip(pixels[depth > _NEAR], 0.0, np.array(image_size, dtype=np.float64) - 1.0)


def hull_area(pixels: np.ndarray) -> float:
    """Area of the convex hull of ``[k, 2]`` pixels; 0 for fewer than three, or all on one line."""
    if len(pixels) < 3:
        return 0.0
    try:
        return float(ConvexHull(pixels).volume)
    except QhullError:  # all points on one line: the box is beside the image and was clipped to its border
        return 0.0


def visible_fraction(
    box: np.ndarray,
    cam_to_world: np.ndarray,
    depth_intrinsic: np.ndarray,
    depth: np.ndarray,
    margin: float = OCCLUSION_MARGIN,
) -> float:
    """Fraction of a grid of points in a box at whose pixels the measured surface lies inside the box (depth test).

    A point counts if it falls into the depth image, its pixel has a measurement, and along the viewing ray that
    measurement is neither before the box (an occluder) nor behind it (background) by more than ``margin``.

    Args:
        box: ``[6]`` centre and size in the axis-aligned world, metres.
        cam_to_world: ``[4, 4]``.
        depth_intrinsic: ``[4, 4]``, of the depth image.
        depth: ``[height, width]`` uint16, millimetres.
        margin: metres.
    """
    points = np.asarray(box[:3]) + _GRID * np.asarray(box[3:6])
    pixels, along = project(points, cam_to_world, depth_intrinsic)
    height, width = depth.shape
    # clipped first: points near the camera's plane have pixels beyond the range of integers
    columns, rows = np.round(np.clip(pixels, -1e6, 1e6)).astype(int).T
    inside = (along > _NEAR) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    measured = np.zeros(len(points))
    measured[inside] = depth[rows[inside], columns[inside]] / 1000.0
    # The measurement is compared with the depths where the ray enters and leaves the box, not with the grid point:
    # an object's surface is anywhere in its box.
    enter, leave = _ray_interval(points, along, box, cam_to_world[:3, 3])
    return float(np.mean((measured > 0) & (measured >= enter - margin) & (measured <= leave + margin)))


def _ray_interval(
    points: np.ndarray, along: np.ndarray, box: np.ndarray, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depths ``[N]`` where the rays from ``origin`` through ``points`` (depths ``along``) enter and leave the box.

    Slab method: per axis the ray crosses two planes; it is in the box from the last entry to the first exit.
    """
    # scaled to depth 1, so that the ray's parameter is the depth
    directions = (points - origin) / np.where(np.abs(along) < _NEAR, _NEAR, along)[:, None]
    directions = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    half = np.asarray(box[3:6]) / 2
    first, second = (box[:3] - half - origin) / directions, (box[:3] + half - origin) / directions
    return np.minimum(first, second).max(axis=1), np.maximum(first, second).min(axis=1)
