"""From 8-bit frames to the inputs of the encoders, on the device: values in [0, 1], and the vision tower's crop.

Frames travel as ``uint8`` from the DataLoader worker to the device. They are converted there, with the arithmetic of
the usual processors: division by 255, then mean and standard deviation, each rounded to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_range(frames: Tensor) -> Tensor:
    """``uint8`` frames of any shape as float32 in [0, 1], on the same device; equal on every device."""
    # Not `/ 255`: on a GPU, PyTorch multiplies by the rounded reciprocal of a Python number, which differs in the last
    # bit for half of the 256 values. A tensor on the device is a true divisor. `full` is a kernel and copies nothing
    # from the host.
    return frames.to(torch.float32).div_(torch.full((), 255.0, device=frames.device))


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(frames / 255 - mean) / std`` per channel, float32.

    Args:
        frames: ``[N, 3, H, W]`` uint8.
        mean, std: per-channel mean and standard deviation of values in [0, 1].
    """
    return unit_range(frames).sub_(per_channel(mean, frames.device)).div_(per_channel(std, frames.device))


def per_channel(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[channels, 1, 1]``, filled on the device: a copy from the host would make the host wait."""
    return torch.stack([torch.full((1, 1), value, device=device, dtype=dtype) for value in values])


def even_crop(frames: Tensor, patch: int = 14, merge: int = 2) -> Tensor:
    """Crop ``[N, 3, H, W]`` at bottom and right to multiples of ``patch * merge``, so that patches can be merged.

    Args:
        frames: frames.
        patch: side in pixels of the vision tower's patches.
        merge: patches per side that become one token.

    Returns:
        A view.

    Raises:
        ValueError: a frame is smaller than one merged patch.
    """
    height, width = even_size(frames.shape[-2], frames.shape[-1], patch, merge)
    return frames[..., :height, :width]


def even_size(height: int, width: int, patch: int = 14, merge: int = 2) -> tuple[int, int]:
    """``(height, width)`` in pixels after `even_crop`; raises the same error."""
    step = patch * merge
    if height < step or width < step:
        raise ValueError(
            f"Frames of {width} x {height} pixels are smaller than one merged patch of {step} x {step}; raise "
            "data.frame_width."
        )
    return height // step * step, width // step * step
