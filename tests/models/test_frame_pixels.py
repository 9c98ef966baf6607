"""8-bit frames become the same numbers as with NumPy, without a wait of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from host_sync import host_reads
from w2r2_ds.models.frame_pixels import even_crop, even_size, normalise, unit_range

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EVERY_VALUE = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)


def test_values_equal_numpys_division_bitwise() -> None:
    wanted = EVERY_VALUE.numpy().astype(np.float32) / np.float32(255)
    assert wanted.min() == 0 and wanted.max() == 1
    np.testing.assert_array_equal(unit_range(EVERY_VALUE).numpy(), wanted)
    reciprocal = EVERY_VALUE.numpy().astype(np.float32) * (np.float32(1) / np.float32(255))
    assert (reciprocal != wanted).any(), "a product with the reciprocal would differ"


def test_normalised_values_equal_numpys_bitwise() -> None:
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    wanted = (EVERY_VALUE.numpy().astype(np.float32) / np.float32(255) - mean) / std
    found = normalise(EVERY_VALUE, MEAN, STD)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_nothing_is_copied_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constants are filled on the device: no operator reads a value, and none gets a tensor of the CPU."""
    assert host_reads(lambda: normalise(EVERY_VALUE, MEAN, STD)) == set()
    on_device = normalise(EVERY_VALUE.to("meta"), MEAN, STD)  # a CPU tensor with dimensions would raise
    assert on_device.device.type == "meta" and on_device.shape == EVERY_VALUE.shape
    divisors: list[torch.device] = []
    real = torch.Tensor.div_

    def div(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        divisors.append(other.device)
        return real(self, other)

    monkeypatch.setattr(torch.Tensor, "div_", div)
    normalise(EVERY_VALUE.to("meta"), MEAN, STD)
    assert [device.type for device in divisors] == ["meta", "meta"], "a divisor on the host becomes a reciprocal"


def test_even_crop_cuts_at_bottom_and_right() -> None:
    frames = torch.arange(42 * 70).reshape(1, 1, 42, 70).expand(1, 3, 42, 70)
    cropped = even_crop(frames)
    assert torch.equal(cropped, frames[:, :, :28, :56]) and even_size(42, 70) == (28, 56)
    assert cropped.data_ptr() == frames.data_ptr(), "a view"


def test_frames_without_one_merged_patch_raise() -> None:
    for call in (lambda: even_crop(torch.zeros(1, 3, 14, 70)), lambda: even_size(14, 70)):
        with pytest.raises(ValueError, match=r"70 x 14 pixels.*data\.frame_width"):
            call()
