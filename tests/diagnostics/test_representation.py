"""Measures of two clouds against closed forms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.spatial import cKDTree

from w2r2_ds.diagnostics.representation import centroid_distance, compare, linear_cka, neighbour_mix, norm_ratio


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    orthogonal, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return np.asarray(orthogonal)


def test_cka_of_a_rotated_scaled_and_shifted_copy_is_one(rng: np.random.Generator) -> None:
    a = rng.normal(size=(50, 8)) * np.arange(1, 9)
    wide = np.concatenate([a @ rotation(rng, 8), np.zeros((50, 3))], axis=-1)
    assert linear_cka(a, 1e-3 * wide - 40) == pytest.approx(1, abs=1e-9)
    assert linear_cka(a, a @ np.diag(1.0 / np.arange(1, 9))) < 0.95  # not invariant to other linear maps


@pytest.mark.parametrize("channels", [4, 2000])
def test_cka_of_independent_clouds_is_small(rng: np.random.Generator, channels: int) -> None:
    """Also with more channels than items, where the biased estimator is channels / (channels + n) = 0.9."""
    a, b = rng.normal(size=(200, channels)), rng.normal(size=(200, channels))
    # The standard deviation of the estimate for Gaussian clouds is about sqrt(2) / n, here 0.007.
    assert abs(linear_cka(a, b)) < 0.05


def test_cka_of_a_mixture_lies_between(rng: np.random.Generator) -> None:
    """b = (a, c) with a and c independent and equally large: K_b = K_a + K_c, so CKA is 1 / sqrt(2)."""
    a, c = rng.normal(size=(2, 2000, 6))
    assert linear_cka(a, np.concatenate([a, c], axis=-1)) == pytest.approx(1 / np.sqrt(2), abs=0.02)


def test_cka_of_constant_vectors_is_undefined(rng: np.random.Generator) -> None:
    a, constant = rng.normal(size=(10, 4)), np.tile(rng.normal(size=4).astype(np.float32), (10, 1))
    assert np.isnan(linear_cka(a, constant))
    with pytest.raises(ValueError, match="10 and 9 rows"):
        linear_cka(a, a[:9])
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(a[:3], a[:3])


def test_centroid_distance_is_in_units_of_the_spread() -> None:
    """Corners of a square: 1 from the mean. The second one is moved by 3, or is twice as large."""
    square = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert centroid_distance(square, square + np.array([3, 0])) == pytest.approx(3)
    assert centroid_distance(square, 2 * square + np.array([3, 0])) == pytest.approx(3 / np.sqrt((1 + 4) / 2))
    assert centroid_distance(square, square) == 0
    assert np.isnan(centroid_distance(square * 0, square * 0 + 1))


def test_neighbours_of_separated_clouds_are_their_own(rng: np.random.Generator) -> None:
    a = rng.normal(size=(40, 5)) + 1e6
    mix, expected = neighbour_mix(a, rng.normal(size=(60, 5)), k=10)
    assert mix == 0 and expected == pytest.approx(2 * 40 * 60 / (100 * 99))


def test_neighbours_of_one_distribution_are_mixed_as_expected(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(600, 3)), rng.normal(size=(300, 3))
    mix, expected = neighbour_mix(a, b, k=8)
    assert expected == pytest.approx(0.4449, abs=1e-4)
    # Standard deviation over random labels is below .01: 900 points x 8 neighbours, of which most occur twice.
    assert mix == pytest.approx(expected, abs=0.04)


def test_neighbours_equal_those_of_a_tree(rng: np.random.Generator) -> None:
    """More points than a block of the distance matrix."""
    a, b = rng.normal(size=(700, 3)), 0.5 * rng.normal(size=(500, 3)) + 0.3
    points = np.concatenate([a, b])
    _, nearest = cKDTree(points).query(points, 6)
    expected = ((nearest[:, 1:] >= 700) != (np.arange(1200) >= 700)[:, None]).mean()
    assert neighbour_mix(a, b, k=5)[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="3 nearest"):
        neighbour_mix(a[:1], b[:2], k=3)


def test_norm_ratio() -> None:
    a = np.array([[3.0, 4], [0, 1]])
    assert norm_ratio(a, np.array([[0.0, 6]])) == pytest.approx(2)
    assert np.isnan(norm_ratio(0 * a, a)) and norm_ratio(a, 0 * a) == 0


def test_comparison_as_json(rng: np.random.Generator) -> None:
    a = rng.normal(size=(30, 4))
    found: dict[str, Any] = json.loads(json.dumps(compare(a, 2 * a + 100, neighbours=5).to_json(), allow_nan=False))
    assert found["cka"] == pytest.approx(1) and found["neighbour_mix"] == 0 and found["centroid_distance"] > 10
    assert set(found) == {"cka", "centroid_distance", "neighbour_mix", "expected_mix", "norm_ratio"}
    assert compare(a, 0 * a).to_json()["cka"] is None
