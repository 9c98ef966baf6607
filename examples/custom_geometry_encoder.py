r"""Example: add a geometry encoder, in one file outside the package.

    python launchers/train.py --plugin examples/custom_geometry_encoder.py --config RECIPE.yaml \
        --model.geometry.name frame_difference --model.geometry.path "" --model.geometry.layers "[0, 1]" \
        --data.frame_width 512 ...

`frame_difference` has no weights. A feature is the mean colour of a patch of 16 pixels, minus that of the same patch in
the reference frame. Layer i also averages over neighbouring patches up to a distance of i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.geometry.encoder import GeometryEncoder, register_geometry_encoder
from w2r2_ds.types.geometry import GeometrySpec

PATCH = 16
"""Side of a patch in pixels."""


@register_geometry_encoder
class FrameDifference(GeometryEncoder):
    """Mean colours of patches minus those of the reference frame."""

    name = "frame_difference"

    def __init__(self, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    @classmethod
    def read_spec(cls, config: GeometryConfig) -> GeometrySpec:
        if config.path:
            raise ValueError(f"model.geometry.path is {config.path!r}; {cls.name} has no files: leave it empty.")
        return GeometrySpec(patch_size=PATCH, feature_dim=3 * len(config.layers))

    @classmethod
    def identity(cls, config: GeometryConfig) -> Mapping[str, Any]:
        # A hash of this file is in the keys of cached features. Increase the version when something else changes them.
        return {"version": 1}

    @classmethod
    def load(cls, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> FrameDifference:
        return cls(config, dtype, device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """``[frames, 3, height, width]`` -> ``[frames, height / 16, width / 16, 3 * layers]``."""
        patches = avg_pool2d(images.to(self.device), PATCH)
        by_layer = [avg_pool2d(patches, 2 * i + 1, 1, padding=i, count_include_pad=False) for i in self.config.layers]
        features = torch.cat(by_layer, dim=1).permute(0, 2, 3, 1)
        reference = features[-1:] if self.config.reference_frame == "last" else features[:1]
        return (features - reference).to(self.dtype)
