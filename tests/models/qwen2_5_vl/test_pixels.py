"""Patches of the vision tower against transformers' processor."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Qwen2VLImageProcessorPil

from w2r2_ds.models.qwen2_5_vl.pixels import patchify


def frames(count: int, height: int, width: int) -> np.ndarray:
    """``uint8 [count, height, width, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def pixels(images: np.ndarray) -> np.ndarray:
    """``float32 [count, 3, height, width]`` in [0, 1]."""
    return images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize(("height", "width"), [(84, 112), (112, 56), (392, 504)])
def test_patches_equal_the_stock_processors(height: int, width: int) -> None:
    given = frames(2, height, width)
    stock = Qwen2VLImageProcessorPil()(list(given), return_tensors="np")
    patches, grid = patchify(pixels(given))
    np.testing.assert_array_equal(grid, stock["image_grid_thw"])
    np.testing.assert_allclose(patches, stock["pixel_values"], rtol=0, atol=1e-6)


def test_patches_of_other_sizes_equal_the_stock_processors() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    given = frames(1, 96, 192)
    stock = Qwen2VLImageProcessorPil(patch_size=16, merge_size=3, image_mean=mean, image_std=std)
    wanted = stock(list(given), return_tensors="np")
    patches, grid = patchify(pixels(given), patch_size=16, merge_size=3, mean=mean, std=std)
    np.testing.assert_array_equal(grid, wanted["image_grid_thw"])
    np.testing.assert_allclose(patches, wanted["pixel_values"], rtol=0, atol=1e-5)


def test_a_video_of_one_frame_equals_the_image() -> None:
    given = pixels(frames(1, 56, 84))
    for video, image in zip(patchify(given, as_video=True), patchify(given), strict=True):
        np.testing.assert_array_equal(video, image)


def test_a_video_pairs_its_frames_and_repeats_the_last() -> None:
    given = pixels(frames(3, 56, 84))
    patches, grid = patchify(given, as_video=True)
    assert grid.tolist() == [[2, 4, 6]]
    in_time = patches.reshape(2, 24, 3, 2, 14, 14)
    single = patchify(given)[0].reshape(3, 24, 3, 2, 14, 14)[:, :, :, 0]
    for clip, (first, second) in zip(in_time, [(0, 1), (2, 2)], strict=True):
        np.testing.assert_array_equal(clip[:, :, 0], single[first])
        np.testing.assert_array_equal(clip[:, :, 1], single[second])


@pytest.mark.parametrize(("height", "width"), [(42, 56), (56, 42)])
def test_sides_that_are_not_multiples_of_a_merged_patch_raise(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width} x {height} pixels must be multiples of 28"):
        patchify(np.zeros((1, 3, height, width), dtype=np.float32))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 1, 28, 28), (0, 3, 28, 28), (1, 3, 0, 28)])
def test_other_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[frames, 3, height, width\]"):
        patchify(np.zeros(shape, dtype=np.float32))
