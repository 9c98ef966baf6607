"""Patches of the vision tower against transformers' processor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from host_sync import host_reads
from w2r2_ds.models.family import find_family
from w2r2_ds.models.qwen2_5_vl.pixels import patchify
from w2r2_ds.types.vision import VisionSpec

SPEC = VisionSpec(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    image_token_id=0,
    video_token_id=1,
    vision_start_id=2,
    tokens_per_second=2,
)
"""Qwen2.5-VL's sizes and normalisation."""


def frames(count: int, height: int, width: int) -> np.ndarray:
    """``uint8 [count, height, width, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    """``uint8 [count, 3, height, width]``."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def numpy_patches(images: np.ndarray, patch: int, merge: int, mean: Any, std: Any) -> np.ndarray:
    """Patches of images, each repeated twice in time: float32 arithmetic of NumPy, one patch after the other."""
    centre, spread = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    normalised = (images.astype(np.float32) / np.float32(255) - centre) / spread  # [count, height, width, 3]
    step, found = patch * merge, []
    for image in normalised:
        height, width = image.shape[:2]
        for top, left, row, column in itertools.product(
            range(0, height, step), range(0, width, step), range(0, step, patch), range(0, step, patch)
        ):
            cut = image[top + row : top + row + patch, left + column : left + column + patch].transpose(2, 0, 1)
            found.append(np.stack([cut, cut], axis=1).ravel())  # channel, time, row, column
    return np.stack(found)


@pytest.mark.parametrize(("height", "width"), [(84, 112), (112, 56), (392, 504)])
def test_patches_equal_the_stock_processors(height: int, width: int) -> None:
    given = frames(2, height, width)
    stock = Qwen2VLImageProcessorPil()(list(given), return_tensors="np")
    np.testing.assert_array_equal(
        find_family("qwen2_5_vl").grid_thw(2, height, width, SPEC, "image"), stock["image_grid_thw"]
    )
    np.testing.assert_allclose(patchify(tensor(given)).numpy(), stock["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 3), (2, 1)])
def test_patches_equal_numpys_bitwise(patch: int, merge: int) -> None:
    given = frames(2, 2 * patch * merge, 3 * patch * merge)
    mean, std = SPEC.image_mean, SPEC.image_std
    patches = patchify(tensor(given), patch, 2, merge, mean, std)
    assert patches.dtype == torch.float32 and patches.is_contiguous()
    np.testing.assert_array_equal(patches.numpy(), numpy_patches(given, patch, merge, mean, std))
    # A crop, which is not contiguous, alike.
    side = patch * merge
    cropped = patchify(tensor(given)[..., :side, : 2 * side], patch, 2, merge, mean, std)
    np.testing.assert_array_equal(cropped.numpy(), numpy_patches(given[:, :side, : 2 * side], patch, merge, mean, std))


def test_patches_are_made_without_a_wait_of_the_host() -> None:
    given = tensor(frames(3, 56, 84))
    for as_video in (False, True):
        assert host_reads(lambda as_video=as_video: patchify(given, as_video=as_video)) == set()
        assert patchify(given.to("meta"), as_video=as_video).shape == patchify(given, as_video=as_video).shape


def test_patches_of_other_sizes_equal_the_stock_processors() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    given = frames(1, 96, 192)
    stock = Qwen2VLImageProcessorPil(patch_size=16, merge_size=3, image_mean=mean, image_std=std)
    wanted = stock(list(given), return_tensors="np")
    patches = patchify(tensor(given), patch_size=16, merge_size=3, mean=mean, std=std)
    spec = replace(SPEC, patch_size=16, merge_size=3)
    np.testing.assert_array_equal(
        find_family("qwen2_5_vl").grid_thw(1, 96, 192, spec, "image"), wanted["image_grid_thw"]
    )
    np.testing.assert_allclose(patches.numpy(), wanted["pixel_values"], rtol=0, atol=1e-5)


def test_a_video_of_one_frame_equals_the_image() -> None:
    given = tensor(frames(1, 56, 84))
    assert torch.equal(patchify(given, as_video=True), patchify(given))


def test_a_video_pairs_its_frames_and_repeats_the_last() -> None:
    given = tensor(frames(3, 56, 84))
    patches = patchify(given, as_video=True).numpy()
    assert find_family("qwen2_5_vl").grid_thw(3, 56, 84, SPEC, "video").tolist() == [[2, 4, 6]]
    in_time = patches.reshape(2, 24, 3, 2, 14, 14)
    single = patchify(given).numpy().reshape(3, 24, 3, 2, 14, 14)[:, :, :, 0]
    for clip, (first, second) in zip(in_time, [(0, 1), (2, 2)], strict=True):
        np.testing.assert_array_equal(clip[:, :, 0], single[first])
        np.testing.assert_array_equal(clip[:, :, 1], single[second])


@pytest.mark.parametrize(("height", "width"), [(42, 56), (56, 42)])
def test_sides_that_are_not_multiples_of_a_merged_patch_raise(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width} x {height} pixels must be multiples of 28"):
        patchify(torch.zeros(1, 3, height, width, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 1, 28, 28), (0, 3, 28, 28), (1, 3, 0, 28)])
def test_other_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[frames, 3, height, width\]"):
        patchify(torch.zeros(shape, dtype=torch.uint8))


def test_frames_of_floats_raise() -> None:
    with pytest.raises(ValueError, match="float32"):
        patchify(torch.zeros(1, 3, 28, 28))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("as_video", [False, True])
def test_a_gpu_makes_the_patches_of_the_cpu_without_a_synchronisation(as_video: bool) -> None:
    given = tensor(frames(3, 56, 84))
    on_gpu = given.to("cuda")
    patchify(on_gpu, as_video=as_video)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        patches = patchify(on_gpu, as_video=as_video)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(patches.cpu(), patchify(given, as_video=as_video))
