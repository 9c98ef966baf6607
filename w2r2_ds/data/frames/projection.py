"""Projection of a box into one posed frame: its pixels, its area, and the fraction of it that is not occluded.

Coordinates: the world is axis-aligned, +z up, in metres. Cameras follow OpenCV (x right, y down, z forward). Pixels are
(x, y) with the origin at the centre of the upper left pixel. A depth image has distances along the camera's z axis.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import ConvexHull, QhullError

from w2r2_ds.boxes3d.transforms import corners, euler_angles_to_matrix
from w2r2_ds.data.sources.cameras import DEPTH_FORMATS
from w2r2_ds.data.sources.frames import Frame

OCCLUSION_MARGIN = 0.1
"""Distance in metres by which a surface may lie in front of or behind the box and still count as the object's."""

MIN_VISIBLE_FRACTION = 0.2
"""Smallest `visible_fraction` at which an object counts as visible in a frame."""

DEPTH_RANGE = (0.1, 20.0)
"""Plausible median depth in metres of an image of a room; outside it, the image is not in millimetres."""

_NEAR = 1e-6  # metres; points closer to the camera's plane have no projection
# 6 x 6 x 6 points in the unit cube. The outer ones are 5 % of the side inside its faces, so that rounding to a pixel
# does not move them off a surface that lies on a face.
_GRID = np.stack(np.meshgrid(*[np.linspace(-0.45, 0.45, 6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
NEAR_EDGES = 0.05
"""Depth at which the edges of a box are clipped, metres."""
EDGES = [(i, i ^ bit) for i in range(8) for bit in (1, 2, 4) if not i & bit]
"""Edges of a box: pairs of corners whose numbers differ in one bit, see `box_corners`."""
_CORNERS = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


def load_depth(frame: Frame) -> np.ndarray:
    """Read a frame's depth image, see `read_depth`."""
    return read_depth(frame.depth)


def read_depth(path: Path) -> np.ndarray:
    """Read a depth image: ``[height, width]`` uint16, millimetres, 0 where nothing was measured.

    Raises:
        ValueError: the file is unreadable, not a 16-bit one-channel PNG, or not in millimetres.
    """
    try:
        with Image.open(path, formats=DEPTH_FORMATS) as image:
            depth = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable depth image; extract it again ({error})") from None
    if depth.ndim != 2 or depth.dtype.kind not in "iu" or depth.dtype.itemsize < 2:
        raise ValueError(f"{path} is not a 16-bit one-channel depth image; extract it again")
    _check_scale(depth, path)
    return depth.astype(np.uint16)


def _check_scale(depth: np.ndarray, path: Path) -> None:
    """Raise ValueError if the median depth is outside ``DEPTH_RANGE``, because the unit is then not millimetres.

    The median is taken over every fourth pixel in both directions. An image without measurements is valid.
    """
    measured = depth[::4, ::4]
    measured = measured[measured != 0]
    if not measured.size:
        return
    median = float(np.median(measured)) / 1000.0
    if not DEPTH_RANGE[0] <= median <= DEPTH_RANGE[1]:
        raise ValueError(
            f"{path}: read as millimetres, the median depth is {median:g} m, which is not plausible for a room; "
            "ScanNet's depth images hold millimetres as uint16, so convert these images to that scale"
        )


def box_corners(box: np.ndarray) -> np.ndarray:
    """Corners ``[8, 3]`` float64 of an axis-aligned box ``[6]`` (centre, size); x varies slowest, z fastest."""
    return np.asarray(box[:3]) + _CORNERS * np.asarray(box[3:6])


def project(points: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project points with a pinhole camera.

    Args:
        points: ``[N, 3]`` in the world, metres.
        cam_to_world: ``[4, 4]`` camera pose.
        intrinsic: ``[4, 4]`` or ``[3, 3]`` pinhole matrix, pixels.

    Returns:
        Pixels ``[N, 2]`` (x, y), undefined for points behind the camera, and depths ``[N]`` along the camera's z axis,
        metres.
    """
    # World to camera: R^-1 (p - t). The points are rows, so the matrix is multiplied from the right, transposed.
    camera = (points - cam_to_world[:3, 3]) @ np.linalg.inv(cam_to_world[:3, :3]).T
    depth = camera[:, 2]
    safe = np.where(np.abs(depth) < _NEAR, _NEAR, depth)
    image = camera @ intrinsic[:3, :3].T
    return image[:, :2] / safe[:, None], depth


def projected_area(
    box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]
) -> float:
    """Area, in square pixels, of the convex hull of a box's corners in an image.

    Corners behind the camera are dropped, the others are clipped to the image. The area is 0 if fewer than three
    corners remain or the camera is inside the box.

    Args:
        box: ``[6]`` (axis-aligned) or ``[9]`` (see ``boxes3d/transforms.py``), in the world, metres.
        cam_to_world: ``[4, 4]`` camera pose.
        intrinsic: ``[4, 4]`` or ``[3, 3]`` pinhole matrix of the image, pixels.
        image_size: width and height of the image, pixels.
    """
    return hull_area(clipped_corners(box, cam_to_world, intrinsic, image_size))


def clipped_corners(
    box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """Pixels ``[k, 2]`` of the corners in front of the camera, clipped to the image; none if the camera is in the box.

    For the arguments see `projected_area`.
    """
    camera, points = cam_to_world[:3, 3] - box[:3], box_corners(box[:6])
    if len(box) == 9:  # camera position along the axes of the box
        camera, points = euler_angles_to_matrix(box[6:]).T @ camera, corners(box)
    if (np.abs(camera) <= np.asarray(box[3:6]) / 2).all():
        return np.empty((0, 2))
    pixels, depth = project(points, cam_to_world, intrinsic)
    return np.clip(pixels[depth > _NEAR], 0.0, np.array(image_size, dtype=np.float64) - 1.0)


def projected_edges(box: np.ndarray, cam_to_world: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Edges of a box in an image, clipped at ``NEAR_EDGES`` but not at the image's borders.

    Args:
        box: ``[6]`` (axis-aligned) or ``[9]`` (see ``boxes3d/transforms.py``), in the world, metres.
        cam_to_world: ``[4, 4]`` camera pose.
        intrinsic: ``[4, 4]`` or ``[3, 3]`` pinhole matrix of the image, pixels.

    Returns:
        ``[edges, 2, 2]`` float64 (edge, end, x and y), pixels; edges behind the camera are skipped.
    """
    points = box_corners(box[:6])
    if len(box) == 9:
        points = (points - box[:3]) @ euler_angles_to_matrix(box[6:]).T + box[:3]
    camera = (points - cam_to_world[:3, 3]) @ cam_to_world[:3, :3]
    lines = []
    for i, j in EDGES:
        a, b = sorted((camera[i], camera[j]), key=lambda p: float(p[2]))  # the end nearer to the camera first
        if b[2] <= NEAR_EDGES:
            continue
        if a[2] < NEAR_EDGES:  # move that end along the edge to the near plane
            a = a + (b - a) * (NEAR_EDGES - a[2]) / (b[2] - a[2])
        ends = np.stack([a, b]) @ intrinsic[:3, :3].T
        lines.append(ends[:, :2] / ends[:, 2:])
    return np.array(lines).reshape(-1, 2, 2)


def hull_area(pixels: np.ndarray) -> float:
    """Area, in square pixels, of the convex hull of ``[k, 2]`` pixels; 0 for fewer than three, or all on one line."""
    if len(pixels) < 3:
        return 0.0
    try:
        return float(ConvexHull(pixels).volume)  # `volume` of a 2D hull is its area, `area` its perimeter
    except QhullError:  # all points on one line: the box is beside the image and was clipped to its border
        return 0.0


def visible_fraction(
    box: np.ndarray,
    cam_to_world: np.ndarray,
    depth_intrinsic: np.ndarray,
    depth: np.ndarray,
    margin: float = OCCLUSION_MARGIN,
) -> float:
    """Visible fraction of a box, estimated by a depth test on a grid of points in it.

    A point counts as visible if it falls into the depth image, its pixel has a measurement, and along the viewing ray
    that measurement is neither in front of the box (an occluder) nor behind it (background) by more than ``margin``.

    Args:
        box: ``[6]`` centre and size in the axis-aligned world, metres.
        cam_to_world: ``[4, 4]`` camera pose.
        depth_intrinsic: ``[4, 4]`` pinhole matrix of the depth image, pixels.
        depth: ``[height, width]`` uint16 depth image, millimetres.
        margin: tolerance in metres.
    """
    points = np.asarray(box[:3]) + _GRID * np.asarray(box[3:6])
    pixels, depths = project(points, cam_to_world, depth_intrinsic)
    height, width = depth.shape
    # Clipped before the conversion: points near the camera's plane have pixels beyond the range of integers.
    columns, rows = np.round(np.clip(pixels, -1e6, 1e6)).astype(int).T
    inside = (depths > _NEAR) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    measured = np.zeros(len(points))
    measured[inside] = depth[rows[inside], columns[inside]] / 1000.0
    # The measurement is compared with the depths where the ray enters and leaves the box, not with that of the grid
    # point: the surface of an object may be anywhere in its box.
    enter, leave = _ray_interval(points, depths, box, cam_to_world[:3, 3])
    return float(np.mean((measured > 0) & (measured >= enter - margin) & (measured <= leave + margin)))


def _ray_interval(
    points: np.ndarray, depths: np.ndarray, box: np.ndarray, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depths ``[N]`` at which the rays from ``origin`` through ``points`` enter and leave a box.

    Slab method: a ray crosses the two planes of each axis; it is in the box from the last entry to the first exit.

    Args:
        points: ``[N, 3]`` in the world, metres.
        depths: ``[N]`` depths of the points, metres.
        box: ``[6]`` centre and size in the axis-aligned world, metres.
        origin: ``[3]`` camera centre, metres.
    """
    # Directions are scaled to depth 1, so that the parameter of a ray is the depth. A tiny value replaces 0, so that a
    # ray parallel to a plane crosses it far away instead of at NaN.
    directions = (points - origin) / np.where(np.abs(depths) < _NEAR, _NEAR, depths)[:, None]
    directions = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    half = np.asarray(box[3:6]) / 2
    low, high = (box[:3] - half - origin) / directions, (box[:3] + half - origin) / directions
    return np.minimum(low, high).max(axis=1), np.maximum(low, high).min(axis=1)
