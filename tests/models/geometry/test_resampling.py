"""Geometry features at the centres of the vision tower's patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from w2r2_ds.models.geometry.resampling import resample_to_patches
from w2r2_ds.models.merger import GeometryMerger

SIZES = [(14, 16), (16, 14), (14, 28), (8, 14), (32, 14)]
"""Patch sizes of the geometry encoder and of the vision tower."""


def reference(features: np.ndarray, geometry: int, tower: int, merge: int) -> np.ndarray:
    """Bilinear interpolation in float64, one value at a time."""
    frames, height, width, channels = features.shape
    rows, columns = (side * geometry // (tower * merge) * merge for side in (height, width))
    result = np.zeros((frames, rows, columns, channels))
    for row in range(rows):
        for column in range(columns):
            y, x = (
                min(max((index + 0.5) * tower / geometry - 0.5, 0), side - 1)
                for index, side in ((row, height), (column, width))
            )
            top, left = int(y), int(x)
            for i, share_y in ((top, top + 1 - y), (min(top + 1, height - 1), y - top)):
                for j, share_x in ((left, left + 1 - x), (min(left + 1, width - 1), x - left)):
                    result[:, row, column] += share_y * share_x * features[:, i, j]
    return result


def test_equal_patch_sizes_return_the_same_tensor() -> None:
    features = torch.randn(2, 3, 5, 4)
    assert resample_to_patches(features, 14, 14, 2) is features


@pytest.mark.parametrize(("geometry", "tower"), SIZES)
def test_values_are_those_of_float64_arithmetic(geometry: int, tower: int) -> None:
    features = torch.randn(2, 9, 11, 3, generator=torch.Generator().manual_seed(0))
    expected = reference(features.double().numpy(), geometry, tower, 2)
    assert expected.size, "the frame has a cell of merged patches"
    torch.testing.assert_close(
        resample_to_patches(features, geometry, tower, 2).double(), torch.from_numpy(expected), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize(("geometry", "tower"), SIZES)
def test_resampled_features_lie_at_the_towers_patch_centres(geometry: int, tower: int) -> None:
    """Features that hold the pixel coordinates of their centres give those of the tower's patches."""
    height, width = 9, 11
    y, x = ((torch.arange(side) + 0.5) * geometry for side in (height, width))
    features = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[None]
    rows, columns = (side * geometry // (2 * tower) * 2 for side in (height, width))
    own_y, own_x = ((torch.arange(side) + 0.5) * tower for side in (rows, columns))
    expected = torch.stack(torch.meshgrid(own_y.clamp(y[0], y[-1]), own_x.clamp(x[0], x[-1]), indexing="ij"), dim=-1)
    torch.testing.assert_close(resample_to_patches(features, geometry, tower, 2)[0], expected, rtol=0, atol=1e-3)


def test_dtype_is_kept_and_interpolated_in_float32() -> None:
    features = torch.randn(1, 6, 6, 4).bfloat16()
    result = resample_to_patches(features, 14, 16, 2)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, resample_to_patches(features.float(), 14, 16, 2).bfloat16())


def test_a_frame_smaller_than_a_merged_patch() -> None:
    merger = GeometryMerger(4, 8, 8)
    with pytest.raises(ValueError, match="geometry merger"):
        merger([resample_to_patches(torch.randn(1, 2, 6, 4), 14, 16, 2)])
