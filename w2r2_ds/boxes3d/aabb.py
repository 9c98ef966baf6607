"""IoU of axis-aligned boxes as the public evaluators compute it: with 1e-8 in the denominator.

    IoU = intersection / (volume_a + volume_b - intersection + 1e-8)

In float64 an exact 0.5 becomes 0.4999999975 and misses ``>= 0.5``; in float32 it stays 0.5. Sources:
daveredrum/ScanRefer ``utils/box_util.py`` and LaVi-Lab/Video-3D-LLM ``llava/eval/box_utils.py`` (float64),
daveredrum/Scan2Cap ``benchmark/box_util.py`` (float32). ``boxes3d/iou.py`` has the exact IoU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-8


def aabb_iou(first: Sequence[float], second: Sequence[float], dtype: type[np.floating] = np.float64) -> float:
    """IoU of two axis-aligned boxes; 0 if a size is not positive.

    Args:
        first: ``[6]`` centre and size, metres.
        second: ``[6]`` centre and size, metres.
        dtype: precision of the arithmetic; corners are computed in float64 and then converted, as Scan2Cap does.

    Raises:
        ValueError: a box is not six finite numbers.
    """
    (low_a, high_a), (low_b, high_b) = _extent(first, dtype), _extent(second, dtype)
    if (high_a <= low_a).any() or (high_b <= low_b).any():
        return 0.0
    intersection = np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), dtype(0)).prod()
    volumes = (high_a - low_a).prod() + (high_b - low_b).prod()
    return float(intersection / (volumes - intersection + dtype(EPSILON)))


def _extent(box: Sequence[float], dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest coordinates of a box, ``[3]`` each."""
    values = np.asarray(box, dtype=np.float64)
    if values.shape != (6,) or not np.isfinite(values).all():
        raise ValueError(f"A box must be six finite numbers (centre, size), not {list(box)!r}.")
    return (values[:3] - values[3:] / 2).astype(dtype), (values[:3] + values[3:] / 2).astype(dtype)
