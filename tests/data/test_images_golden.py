"""Frames for VGGT and Qwen against the output of the public pre-processing code for the same PNG files."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from golden_files import Golden, find, is_qwen_images, is_vggt_images
from w2r2_ds.data.images import load_frame, resize_frames
from w2r2_ds.models.frame_pixels import even_crop, even_size, unit_range
from w2r2_ds.models.qwen2_5_vl.pixels import patchify

pytestmark = pytest.mark.golden

SUM_ERROR = 6e-4
"""Error of recorded sums, which are rounded to three decimals."""
PATCH_ERROR = 1e-5
"""Error of recorded patch values that the reference's conversion to 8 bits did not change."""


def cases(files: list[Golden]) -> list[Any]:
    return [
        pytest.param(golden, case, id=f"{golden.name}-{case}") for golden in files for case in golden.record["results"]
    ]


VGGT_CASES = cases(find(is_vggt_images))
QWEN_CASES = cases(find(is_qwen_images))


@cache
def vggt_pixels(golden: Golden, case: str) -> np.ndarray:
    stated = golden.record["results"][case]
    frames = [load_frame(golden.path.parent / name) for name in stated["images"]]
    resized = resize_frames(frames, width=stated["shape"][-1], patch=14, mode=stated["mode"])
    return unit_range(torch.from_numpy(resized)).numpy()


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * 255).astype(np.uint8)


@pytest.mark.parametrize(("golden", "case"), VGGT_CASES)
def test_resized_frames_have_the_recorded_shape_and_sums(golden: Golden, case: str) -> None:
    stated, pixels = golden.record["results"][case], vggt_pixels(golden, case)
    assert pixels.shape == tuple(stated["shape"])
    sums = pixels.sum(axis=(2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums, stated["sum_per_image_channel"], rtol=0, atol=SUM_ERROR)


@pytest.mark.parametrize(("golden", "case"), VGGT_CASES)
def test_resized_frames_equal_the_recorded_ones_bitwise(golden: Golden, case: str) -> None:
    stated, pixels = golden.record["results"][case], vggt_pixels(golden, case)
    assert digest(as_bytes(pixels)) == stated["sha256_uint8_chw"]
    assert digest(pixels.astype("<f4")) == stated["sha256_float32_chw"]


@pytest.mark.parametrize(("golden", "case"), VGGT_CASES)
def test_resized_frames_have_the_recorded_pixels(golden: Golden, case: str) -> None:
    stride, pixels = golden.record["results"][case]["stride"], vggt_pixels(golden, case)
    height, width = pixels.shape[-2:]
    cuts = {
        "strided": pixels[:, :, ::stride, ::stride],
        "col_mid": pixels[:, :, :, width // 2],
        "row_mid": pixels[:, :, height // 2, :],
    }
    for name, cut in cuts.items():
        key = f"{case}/{name}"
        assert cut.shape == golden.shape(key)
        np.testing.assert_array_equal(cut, golden.tensors[key].numpy(), err_msg=key)


@cache
def qwen_input(golden: Golden, case: str) -> tuple[np.ndarray, np.ndarray]:
    """VGGT's pixels and Qwen's patches."""
    stated = golden.record["results"][case]
    path = golden.path.parent / golden.record["images_dir"] / stated["image"]
    frames = torch.from_numpy(resize_frames([load_frame(path)], width=stated["images_vggt_shape"][-1], patch=14))
    mean, std = golden.record["image_mean"], golden.record["image_std"]
    patches = patchify(even_crop(frames), mean=mean, std=std)
    return unit_range(frames).numpy(), patches.numpy()


@pytest.mark.parametrize(("golden", "case"), QWEN_CASES)
def test_qwen_path_resizes_as_recorded(golden: Golden, case: str) -> None:
    stated, (pixels, _) = golden.record["results"][case], qwen_input(golden, case)
    assert pixels.shape[1:] == tuple(stated["images_vggt_shape"])
    assert digest(as_bytes(pixels)) == stated["sha256_images_vggt_uint8"]


@pytest.mark.parametrize(("golden", "case"), QWEN_CASES)
def test_qwen_patches_have_the_recorded_grid_and_sums(golden: Golden, case: str) -> None:
    stated, (pixels, patches) = golden.record["results"][case], qwen_input(golden, case)
    height, width = even_size(*pixels.shape[-2:])
    assert [1, height // 14, width // 14] == stated["image_grid_thw"]
    assert patches.shape == tuple(stated["pixel_values_shape"])
    assert patches.sum(dtype=np.float64) == pytest.approx(stated["sum"], abs=1e-6 * stated["abs_sum"])
    assert np.abs(patches).sum(dtype=np.float64) == pytest.approx(stated["abs_sum"], rel=1e-6)


@pytest.mark.parametrize(("golden", "case"), QWEN_CASES)
def test_qwen_patches_have_the_recorded_values(golden: Golden, case: str) -> None:
    stated, (_, patches) = golden.record["results"][case], qwen_input(golden, case)
    rows, columns = stated["stride"]
    cuts = {
        "pixel_values_strided": patches[::rows, ::columns],
        "pixel_values_row0": patches[0],
        "pixel_values_last": patches[-1],
    }
    recorded = {key for key in golden.record["tensors"] if key.startswith(f"{case}/")}
    assert recorded == {f"{case}/{name}" for name in cuts}, "every recorded tensor is compared"
    bound = PATCH_ERROR + stated["max_abs_diff_to_direct_normalise"]
    for name, cut in cuts.items():
        key = f"{case}/{name}"
        assert cut.shape == golden.shape(key)
        np.testing.assert_allclose(cut, golden.tensors[key].numpy(), rtol=0, atol=bound, err_msg=key)
