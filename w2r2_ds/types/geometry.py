"""`GeometrySpec`: sizes of a geometry encoder and the kind of its input, for pre-processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ScaleHint = Literal["none", "depth", "poses"]
"""Metric lengths that a geometry encoder compares with its predictions: none, depth, or distances of camera centres."""
DemoGeometry = Literal["point_map", "vggt"]
"""Geometry encoders with a pretrained pair of tiny models (`demo.geometry`)."""


@dataclass(frozen=True)
class PointMapSpec:
    """Point maps, the input of a geometry encoder that needs depth images and camera poses in place of colour images.

    Attributes:
        points_per_side: k; a patch has k x k points, at the centres of k x k equal parts of it.
        reference_frame: coordinate system of the points, metres: ``world`` (axis-aligned, +z up, as the labels),
            ``camera`` (OpenCV camera of every frame), ``first`` or ``last`` (that of the sample's first or last frame).
    """

    points_per_side: int
    reference_frame: str

    @property
    def needs_poses(self) -> bool:
        """Whether the coordinates depend on the camera poses."""
        return self.reference_frame != "camera"


@dataclass(frozen=True)
class GeometrySpec:
    """Input and output sizes of a geometry encoder; available without its weights.

    Attributes:
        patch_size: side of a patch in pixels; frames are resized to multiples of it, and each patch gives one feature.
        feature_dim: channels of a feature, summed over the selected layers.
        point_maps: the point maps that the encoder needs; None for an encoder of images.
        scale_channels: number of the last channels, which code the metric scale of the scene and are equal for all
            features of a frame set; 0 without a scale hint.
        scale_hint: metric lengths from which these channels are computed; ``none`` without them.
    """

    patch_size: int
    feature_dim: int
    point_maps: PointMapSpec | None = None
    scale_channels: int = 0
    scale_hint: ScaleHint = "none"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the feature grid of a frame of `height` x `width` pixels."""
        return height // self.patch_size, width // self.patch_size

    def point_map_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape ``[frames, rows, columns, k * k, 3]`` of the point maps of frames of `height` x `width` pixels."""
        assert self.point_maps is not None, "the encoder needs images"
        return frames, *self.grid(height, width), self.point_maps.points_per_side**2, 3

    def scale_reference_shape(self, frames: int, height: int, width: int) -> tuple[int, ...] | None:
        """Shape of the metric lengths for the scale hint (`Visuals.scale_reference`); None without a scale hint."""
        if self.scale_hint == "none":
            return None
        return (frames, *self.grid(height, width)) if self.scale_hint == "depth" else (frames, 3)

    def frame_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of the frames, from the shape of the encoder's input for them."""
        if self.point_maps is None:
            _, _, height, width = shape
            return height, width
        return shape[1] * self.patch_size, shape[2] * self.patch_size
