"""Geometry encoder without weights: exact 3D points of every patch, from depth and camera poses, as sin-cos codes.

With it a model has metric coordinates in its geometry branch, as far as depth is measured. The points come from the
data loader (`data/frames/point_maps.py`); this file encodes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.geometry.encoder import GeometryEncoder, register_geometry_encoder
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec

PATCH_SIZE = 14
"""Side of a patch in pixels, as in Qwen2.5-VL's vision tower."""
POINTS_PER_SIDE = 2
"""A patch has this number of points, squared."""
WAVELENGTHS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
"""Wavelengths in metres of the sin-cos code: from the size of a large room to that of a small object, in octaves."""
CHANNELS = 3 * (1 + 2 * len(WAVELENGTHS)) + 1
"""Channels of a point: its coordinates, sine and cosine of each at every wavelength, and validity."""


@register_geometry_encoder
class PointMapEncoder(GeometryEncoder):
    """Codes of the points of a patch, see `point_codes`; the points are in row-major order.

    Args:
        dtype: dtype of the features; codes are computed in float32.
        device: device of the features.
    """

    name = "point_map"
    reference_frames = ("world", "camera", "first", "last")

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        # Once, not in `encode`: a copy to the GPU would make the host wait.
        self.frequencies = torch.tensor([2 * math.pi / length for length in WAVELENGTHS], device=device)

    @classmethod
    def read_spec(cls, config: GeometryConfig) -> GeometrySpec:
        if config.path:
            raise ValueError(f"model.geometry.path is {config.path!r}; point_map has no files: leave it empty.")
        if config.layers != [0]:
            raise ValueError(f"model.geometry.layers is {config.layers}; point_map has no layers: leave it out.")
        point_maps = PointMapSpec(POINTS_PER_SIDE, config.reference_frame)
        return GeometrySpec(PATCH_SIZE, POINTS_PER_SIDE**2 * CHANNELS, point_maps)

    @classmethod
    def identity(cls, config: GeometryConfig) -> Mapping[str, Any]:
        return {"version": 1, "points_per_side": POINTS_PER_SIDE, "wavelengths": WAVELENGTHS}

    @classmethod
    def load(cls, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> PointMapEncoder:
        return cls(dtype, device)

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """``[frames, rows, columns, 4, 3]`` points -> ``[frames, rows, columns, 184]`` features."""
        return point_codes(inputs.to(self.frequencies.device), self.frequencies).flatten(-2).to(self.dtype)


def point_codes(points: Tensor, frequencies: Tensor) -> Tensor:
    """Code points: x y z in metres, sines, cosines, and 1; all zeros for a point without measured depth.

    A patch without any measured depth thus has the feature 0, which also stands for missing geometry in
    `model.zero_geometry: features`.

    Args:
        points: ``[..., 3]`` float32, metres; NaN without measured depth.
        frequencies: ``[n]`` float32, radians per metre.

    Returns:
        ``[..., 3 + 2 * 3 * n + 1]`` float32: coordinates, sines (x at all frequencies, then y, then z), cosines in the
        same order, validity.
    """
    valid = points.isfinite().all(-1, keepdim=True)
    phases = (points.unsqueeze(-1) * frequencies).flatten(-2)
    codes = torch.cat([points, phases.sin(), phases.cos(), torch.ones_like(points[..., :1])], dim=-1)
    return torch.where(valid, codes, 0.0)
