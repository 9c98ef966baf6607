"""Measures of how two sets of feature vectors relate, which do not depend on a picture; NumPy, float64.

`compare` computes all of them for two clouds with a row per token, such as the 2D tokens and the merged geometry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BLOCK = 512
"""Rows of a distance matrix that are computed at once."""


@dataclass(frozen=True)
class Comparison:
    """Two clouds of feature vectors.

    Attributes:
        cka: `linear_cka`, 1 for the same representation up to rotation and scale, about 0 for unrelated ones.
        centroid_distance: `centroid_distance`, 0 for the same mean; above 1 the means are farther apart than the points
            of a cloud are from their mean.
        neighbour_mix: `neighbour_mix`, 0 for separated clouds.
        expected_mix: value of `neighbour_mix` if both clouds were drawn from one distribution.
        norm_ratio: mean norm of the second cloud divided by that of the first.
    """

    cka: float
    centroid_distance: float
    neighbour_mix: float
    expected_mix: float
    norm_ratio: float

    def to_json(self) -> dict[str, float | None]:
        """The fields; null for a measure that is not defined, such as the CKA of constant vectors."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def compare(a: np.ndarray, b: np.ndarray, neighbours: int = 10) -> Comparison:
    """All measures of two clouds ``[n, channels]`` whose rows belong together.

    Args:
        a, b: the clouds, n >= 4.
        neighbours: k of `neighbour_mix`.
    """
    mix, expected = neighbour_mix(a, b, neighbours)
    return Comparison(linear_cka(a, b), centroid_distance(a, b), mix, expected, norm_ratio(a, b))


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two representations of the same n items, with the unbiased HSIC.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), with the estimator of Song
    et al., "Feature Selection via Dependence Maximization" (JMLR 2012), eq. 5. The usual biased estimator, of
    independent representations, approaches 1 when there are more channels than items, as here. The unbiased one is
    about 0 then, and may be slightly negative.

    Args:
        a: ``[n, channels of a]``, n >= 4.
        b: ``[n, channels of b]``, rows in the same order.

    Returns:
        1 for representations that are equal up to an orthogonal map, a scale and a shift. NaN if one is constant.

    Raises:
        ValueError: the numbers of rows differ, or are below 4.
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA compares representations of the same items, at least 4; got {len(a)} and {len(b)} rows.")
    gram_a, gram_b = _gram(a), _gram(b)
    own = _hsic(gram_a, gram_a) * _hsic(gram_b, gram_b)
    return _hsic(gram_a, gram_b) / math.sqrt(own) if own > 0 else math.nan


def _gram(points: np.ndarray) -> np.ndarray:
    """``[n, n]`` inner products of the centred rows, scaled to norm about 1, with a zero diagonal."""
    centred = np.asarray(points, dtype=np.float64) - np.mean(points, axis=0, dtype=np.float64)
    size = np.sqrt(np.mean(centred**2))
    # Below the rounding of float32 features, the vectors count as constant.
    centred = centred / size if size > 1e-7 * np.sqrt(np.mean(np.square(points, dtype=np.float64))) else centred * 0
    gram: np.ndarray = centred @ centred.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased Hilbert-Schmidt independence criterion of two kernel matrices with zero diagonals (Song et al.)."""
    n = len(k)
    trace = float((k * m).sum())
    product = float(k.sum() * m.sum()) / ((n - 1) * (n - 2))
    rows = 2 * float(k.sum(0) @ m.sum(0)) / (n - 2)
    return (trace + product - rows) / (n * (n - 3))


def centroid_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the means of two clouds ``[n, channels]``, relative to their spread.

    The spread is the root of the mean squared distance of a point from the mean of its cloud, averaged over both
    clouds. NaN if both clouds are constant.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    mean_a, mean_b = a.mean(0), b.mean(0)
    variance = ((a - mean_a) ** 2).sum(-1).mean() / 2 + ((b - mean_b) ** 2).sum(-1).mean() / 2
    return float(np.linalg.norm(mean_a - mean_b) / np.sqrt(variance)) if variance > 0 else math.nan


def neighbour_mix(a: np.ndarray, b: np.ndarray, k: int = 10) -> tuple[float, float]:
    """Share of a point's k nearest neighbours (Euclidean) that are of the other cloud, mean over the points of both.

    Args:
        a: ``[n, channels]``.
        b: ``[m, channels]``.
        k: number of neighbours, below n + m.

    Returns:
        The share, and its expectation if the labels of the clouds were assigned to the points at random,
        ``2 n m / ((n + m) (n + m - 1))``. 0 for separated clouds.

    Raises:
        ValueError: there are not more points than neighbours.
    """
    n, m = len(a), len(b)
    if k < 1 or n + m <= k:
        raise ValueError(f"{k} nearest neighbours need more than {n} + {m} points.")
    points = np.concatenate([a, b]).astype(np.float64)
    points -= points.mean(0)  # distances of points far from the origin would lose digits
    is_b = np.arange(n + m) >= n
    squares = (points**2).sum(-1)
    others = 0
    for start in range(0, n + m, BLOCK):
        rows = slice(start, min(start + BLOCK, n + m))
        distance = squares[rows, None] - 2 * points[rows] @ points.T + squares
        distance[np.arange(len(distance)), np.arange(rows.start, rows.stop)] = np.inf  # not its own neighbour
        nearest = np.argpartition(distance, k - 1, axis=-1)[:, :k]
        others += int((is_b[nearest] != is_b[rows, None]).sum())
    return others / ((n + m) * k), 2 * n * m / ((n + m) * (n + m - 1))


def norm_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Euclidean norm of the rows of `b` divided by that of `a`; NaN if all rows of `a` are 0."""
    norm_a, norm_b = (float(np.linalg.norm(np.asarray(points, dtype=np.float64), axis=-1).mean()) for points in (a, b))
    return norm_b / norm_a if norm_a > 0 else math.nan
