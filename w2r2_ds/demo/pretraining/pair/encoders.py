"""The geometry encoders of the pair: exact point maps, or the tiny VGGT."""

from __future__ import annotations

from pathlib import Path

import torch

from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.demo.assets import VGGT, WEIGHTS
from w2r2_ds.features.key import encoder_identity
from w2r2_ds.models.build import load_geometry
from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS, GeometryEncoder
from w2r2_ds.types.geometry import DemoGeometry

VGGT_WEIGHTS = WEIGHTS / VGGT
"""The tiny VGGT that the package contains."""
VGGT_LAYERS = (3,)
"""Layers whose tokens are the features: the last one."""


def geometry_config(geometry: DemoGeometry, vggt: Path = VGGT_WEIGHTS) -> GeometryConfig:
    """`model.geometry` of the pair.

    Args:
        geometry: name of the encoder.
        vggt: folder of the VGGT.
    """
    if geometry == "point_map":
        return GeometryConfig(name=geometry, reference_frame="world")
    return GeometryConfig(name=geometry, path=str(vggt), layers=list(VGGT_LAYERS))


def load_encoder(config: GeometryConfig) -> GeometryEncoder:
    """The frozen encoder in float32, on the CPU.

    Raises:
        ValueError: the folder has no weights.
    """
    return load_geometry(ModelConfig(geometry=config, dtype="float32"), torch.device("cpu"))


def identity(config: GeometryConfig) -> dict[str, str]:
    """Digest of the weights and settings of an encoder that has files; empty for point maps."""
    if not config.path:
        return {}
    return {config.name: encoder_identity(GEOMETRY_ENCODERS.find(config.name).identity(config))}
