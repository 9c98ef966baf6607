"""`GeometrySpec`: sizes of a geometry encoder, for pre-processing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeometrySpec:
    """Patch size and feature dimension of a geometry encoder; available without its weights.

    Attributes:
        patch_size: side of a patch in pixels; frames are resized to multiples of it, and each patch gives one feature.
        feature_dim: channels of a feature, summed over the selected layers.
    """

    patch_size: int
    feature_dim: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the feature grid of a frame of `height` x `width` pixels."""
        return height // self.patch_size, width // self.patch_size
