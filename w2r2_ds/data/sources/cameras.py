"""Readers of ScanNet's camera files: poses, intrinsics and the alignment of a scan, with checks of their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from w2r2_ds.data.images import is_complete_image

DEPTH_FORMATS = ("PNG", "PPM")
"""Formats of depth images that PIL may decode: 16-bit PNG, and the 16-bit PGM of ScanNet's SensReader."""
RIGID_TOLERANCE = 1e-2
"""Largest deviation of R R^T from the identity. Poses of trackers in float32, written with few decimals, are off by up
to 1e-3; a scale or a transposed matrix by much more."""
MAX_EXTENT = 100.0
"""Largest plausible extent in metres of the camera centres of an indoor scan; ScanNet's are below 20."""
CENTER_RANGE = (0.35, 0.65)
"""Plausible position of the principal point as a fraction of the width and of the height. Real lenses are within 0.05
of the middle; intrinsics of images with 1.5 times the width, or of images that were turned, are outside."""


def read_text(path: Path, content: str) -> str:
    """Text of a file; `content` describes it in messages."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        raise ValueError(
            f"{path} ({content}) does not exist; prepare the scene, or correct data.root (or --root)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} ({content}) cannot be read: {error}") from None


def _matrix(text: str, path: Path, field: str) -> np.ndarray:
    """``[4, 4]`` float64 matrix of 16 numbers in a text, of which some may be nan or inf."""
    words = text.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{path}: {field} holds something that is not a number; extract it again") from None
    if len(values) != 16:
        raise ValueError(f"{path}: {field} has {len(values)} numbers instead of 16; the file may be truncated")
    return np.array(values, dtype=np.float64).reshape(4, 4)


def _field(text: str, field: str) -> str | None:
    """Value of the line ``FIELD = VALUE`` of a text; None if there is no such line."""
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.strip() == field:
            return value
    return None


def _not_rigid(matrix: np.ndarray) -> str:
    """Why a ``[4, 4]`` matrix is not a rotation and a translation; empty if it is one."""
    rotation = matrix[:3, :3]
    if not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-3):
        return f"its last row is {matrix[3].tolist()}, not 0 0 0 1 (is it transposed?)"
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=RIGID_TOLERANCE):
        return "its upper left 3 x 3 part is not orthonormal (is it scaled?)"
    if np.linalg.det(rotation) < 0:
        return "it mirrors (determinant -1); OpenCV's axes are x right, y down, z forward"
    return ""


def read_alignment(path: Path, required: bool = True) -> np.ndarray:
    """Matrix ``axisAlignment`` of a file ``scans/SCENE/SCENE.txt``: ``[4, 4]`` float64, raw to axis-aligned world.

    Args:
        path: the scan's description.
        required: whether a file without the line is an error. If not, the result is the identity; ScanNet's hidden test
            scans have no alignment.

    Raises:
        ValueError: the file is missing, the matrix is not a rotation and a translation, or the line is missing although
            it is required.
    """
    value = _field(read_text(path, "the scan's description"), "axisAlignment")
    if value is not None:
        matrix = _matrix(value, path, "axisAlignment")
        problem = "it is not finite" if not np.isfinite(matrix).all() else _not_rigid(matrix)
        if problem:
            raise ValueError(
                f"{path}: axisAlignment is not a rotation and a translation: {problem}; copy the file again"
            )
        return matrix
    if not required:
        return np.eye(4)
    raise ValueError(f"{path}: there is no line 'axisAlignment = 16 numbers'; ScanNet's hidden test scans have none")


def read_intrinsic(path: Path, info_field: str) -> np.ndarray:
    """``[4, 4]`` float64 pinhole matrix of an intrinsics file, pixels.

    Args:
        path: file of 16 numbers, or ``_info.txt`` of ScanNet's SensReader.
        info_field: name of the line in ``_info.txt``.
    """
    text = read_text(path, "the camera's intrinsics")
    if path.name == "_info.txt":
        value = _field(text, info_field)
        if value is None:
            raise ValueError(f"{path}: there is no line '{info_field} = 16 numbers'; extract the frames again")
        text = value
    matrix = _matrix(text, path, "the intrinsic matrix")
    if not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise ValueError(f"{path}: the focal lengths must be positive and every entry finite; write the file again")
    return matrix


def read_pose(path: Path) -> np.ndarray:
    """``[4, 4]`` float64 camera pose; nan or inf where tracking was lost.

    Raises:
        ValueError: the file is not 16 numbers, or the pose is finite and not a rotation and a translation.
    """
    pose = _matrix(read_text(path, "a camera pose"), path, "the pose")
    problem = _not_rigid(pose) if np.isfinite(pose).all() else ""
    if problem:
        raise ValueError(
            f"{path}: the pose is not a rotation and a translation: {problem}; write camera-to-world poses"
        )
    return pose


def is_marked_lost(pose: str) -> bool:
    """Whether the text of a pose has nan or inf, ScanNet's mark of lost tracking."""
    return any(word.lower().lstrip("+-").startswith(("nan", "inf")) for word in pose.split())


def check_extent(folder: Path, poses: list[np.ndarray]) -> None:
    """Raise ``ValueError`` if camera centres are so far apart that they cannot be in metres."""
    centers = np.stack([pose[:3, 3] for pose in poses])
    extent = float((centers.max(axis=0) - centers.min(axis=0)).max())
    if extent > MAX_EXTENT:
        raise ValueError(
            f"{folder}: the cameras are up to {extent:.4g} m apart, which is not plausible for an indoor scan; poses "
            "are in metres, so convert them (perhaps from millimetres)"
        )


def check_principal_point(path: Path, intrinsic: np.ndarray, image: Path, size: tuple[int, int]) -> None:
    """Raise ``ValueError`` if the principal point is far from the middle of the images.

    Args:
        path: intrinsics file.
        intrinsic: its ``[4, 4]`` matrix, pixels.
        image: one of the images.
        size: width and height of the images, pixels.
    """
    center = intrinsic[0, 2], intrinsic[1, 2]
    low, high = CENTER_RANGE
    if not all(low <= point / side <= high for point, side in zip(center, size, strict=True)):
        raise ValueError(
            f"{path} has the principal point ({center[0]:g}, {center[1]:g}), as for images of about "
            f"{2 * center[0]:.0f} x {2 * center[1]:.0f} pixels, but {image.name} has {size[0]} x {size[1]}; scale the "
            "intrinsics as the images, or extract the images again"
        )


def depth_size(path: Path) -> tuple[int, int]:
    """Width and height of a depth image in pixels, from its header; a file that may be truncated is decoded.

    Raises:
        ValueError: the file is not a PNG or PGM image, or is truncated.
    """
    try:
        with Image.open(path, formats=DEPTH_FORMATS) as image:
            if not is_complete_image(path):  # also a PGM file, which has no end marker
                image.load()
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable depth image; extract it again ({error})") from None
