"""`GeometryEncoder`, the interface of frozen encoders of the frames of a scene, and the registry of encoders.

Built-in encoders are imported on first use. Users register their own in a file that ``--plugin FILE`` imports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.utils.registry import Registry


class GeometryEncoder(ABC):
    """Frozen encoder of the frames of one scene: a grid of features per frame.

    It is not an `nn.Module`: as an attribute of a model it is neither trained, nor sharded or saved by DeepSpeed. The
    watchdog's reports name modules that are attributes of the encoder.

    Attributes:
        spec: sizes of input and output, the result of `read_spec`; set by `models.build.load_geometry`.
    """

    name: ClassVar[str]
    """Value of `model.geometry.name`."""

    reference_frames: ClassVar[tuple[str, ...]] = ("first", "last")
    """Supported values of `model.geometry.reference_frame`."""

    scale_hints: ClassVar[tuple[str, ...]] = ("none",)
    """Supported values of `model.geometry.scale_hint`; only ``none`` for an encoder whose features are metric."""

    spec: GeometrySpec

    @classmethod
    @abstractmethod
    def read_spec(cls, config: GeometryConfig) -> GeometrySpec:
        """Patch size, channels and kind of input, from configuration files alone.

        Raises:
            ValueError: there are no files at `model.geometry.path`, or a layer does not exist.
        """

    @classmethod
    @abstractmethod
    def identity(cls, config: GeometryConfig) -> Mapping[str, Any]:
        """Everything that determines the features of given inputs, besides name, layers, reference frame and dtype.

        Usually a digest of the weights and the encoder's configuration, as JSON values. It is part of the key of the
        feature cache and of every checkpoint.
        """

    @classmethod
    @abstractmethod
    def load(cls, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> GeometryEncoder:
        """Load the encoder with its weights, frozen, on a device.

        Raises:
            ValueError: the weights are missing or damaged, or an option has a value that is not supported.
        """

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Features of the frames of one scene, without gradient.

        Args:
            inputs: the frames in order. Images are ``[frames, 3, height, width]`` float32 in [0, 1], made from the
                batch's uint8 frames on the same device; height and width are multiples of the patch size. With
                `spec.point_maps`, point maps ``[frames, height / patch_size, width / patch_size, k * k, 3]`` float32,
                metres, NaN where no depth was measured.

        Returns:
            ``[frames, height / patch_size, width / patch_size, feature_dim]`` on the device of the weights. Several
            layers are concatenated along the channels, in the order of `model.geometry.layers`.
        """

    def encode_frames(self, frames: Tensor, scale_reference: Tensor | None = None) -> Tensor:
        """`encode` one frame set of a batch, with the channels of the scale hint if the spec has any.

        Args:
            frames: an entry of `Visuals.geometry_frames`, uint8 images or point maps.
            scale_reference: an entry of `Visuals.scale_reference`; None without a scale hint.
        """
        return self.encode(unit_range(frames) if self.spec.point_maps is None else frames)

    def flops(self, frames: int, height: int, width: int) -> float:
        """Model FLOPs of `encode`, for the metric `mfu`; 0 if an encoder does not count them."""
        return 0.0


BUILT_IN = {"vggt": "w2r2_ds.models.vggt.encoder", "point_map": "w2r2_ds.models.geometry.point_map"}
"""Name -> module, imported on first use; it registers its encoder."""

GEOMETRY_ENCODERS: Registry[type[GeometryEncoder]] = Registry("model.geometry.name", BUILT_IN)


def register_geometry_encoder(encoder: type[GeometryEncoder]) -> type[GeometryEncoder]:
    """Class decorator: register an encoder under its `name`; raises ValueError if another encoder has it."""
    return GEOMETRY_ENCODERS.register(encoder.name, encoder)


def geometry_spec(config: GeometryConfig) -> GeometrySpec:
    """Sizes and input of the encoder of `model.geometry`.

    Raises:
        ValueError: the encoder does not exist or lacks files, or does not support reference frame or scale hint.
    """
    encoder = GEOMETRY_ENCODERS.find(config.name)
    if config.reference_frame not in encoder.reference_frames:
        raise ValueError(
            f"model.geometry.reference_frame is {config.reference_frame}, which {config.name} does not support; it is "
            f"one of {', '.join(encoder.reference_frames)}."
        )
    if config.scale_hint not in encoder.scale_hints:
        raise ValueError(
            f"model.geometry.scale_hint is {config.scale_hint}, which {config.name} does not support; it is one of "
            f"{', '.join(encoder.scale_hints)}."
        )
    return encoder.read_spec(config)
