"""Sizes of a geometry encoder, for pre-processing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeometrySpec:
    """Sizes of a geometry encoder for the data pipeline; no weights.

    Attributes:
        patch_size: side in pixels of the image patch that a feature stands for; frames are resized to multiples of it.
        feature_dim: channels of a feature, of all selected layers together.
    """

    patch_size: int
    feature_dim: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the features of a frame of this size in pixels."""
        return height // self.patch_size, width // self.patch_size
