"""Inputs of the encoders that the model computes from the frames of a batch."""

from __future__ import annotations

from typing import Any

import torch

from w2r2_ds.models.family import find_family
from w2r2_ds.models.frame_pixels import unit_range


def pixel_values(visuals: Any) -> torch.Tensor:
    """``[patches, values]`` float32, the input of Qwen2.5-VL's vision tower."""
    return find_family("qwen2_5_vl").tower_pixels(visuals, torch.float32)


def geometry_images(visuals: Any) -> list[torch.Tensor]:
    """Per frame set, ``[frames, 3, height, width]`` float32 in [0, 1], the input of the geometry encoder."""
    return [unit_range(frames) for frames in visuals.geometry_frames]
