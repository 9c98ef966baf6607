"""Open the feature cache of a configuration, with keys that contain everything on which features depend."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from w2r2_ds.config.schema import DataConfig, ModelConfig
from w2r2_ds.features.key import encoder_identity
from w2r2_ds.features.lookup import FeatureCache
from w2r2_ds.features.store import FeatureStore
from w2r2_ds.kernels.select import resolve_dtype, segment_attention
from w2r2_ds.models.family import find_family
from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS, geometry_spec
from w2r2_ds.models.weights.loading import load_model_config, load_vision_spec
from w2r2_ds.models.weights.weights_hash import model_weights, tensors_digest
from w2r2_ds.utils.files.output_folder import make_folder
from w2r2_ds.utils.source_hash import source_sha256


def open_cache(data: DataConfig, model: ModelConfig) -> FeatureCache | None:
    """Open the cache in the folder `data.cache`; None if `data.cache` is the empty string.

    Raises:
        ValueError: the folder cannot be created, an encoder's weights are not found, or the geometry encoder's input
            are point maps.
    """
    if not data.cache:
        return None
    if geometry_spec(model.geometry).point_maps is not None:
        raise ValueError(
            f"data.cache is {data.cache}, but features of model.geometry.name {model.geometry.name} are not cached: "
            "they depend on depth images and poses, which are not in the key, and are cheap to compute; leave "
            "data.cache empty."
        )
    folder = Path(data.cache)
    try:
        make_folder(folder)
    except OSError as error:
        raise ValueError(f"data.cache is {folder}, which cannot be created ({error}); name another folder.") from error
    store = FeatureStore(folder.absolute(), int(data.cache_gib * 2**30))
    vision = vision_identity(data, model) if data.cached_features == "geometry+2d" else None
    return FeatureCache(store, geometry_identity(data, model), vision)


def geometry_identity(data: DataConfig, model: ModelConfig) -> str:
    """Hash of the geometry encoder, its options and its pre-processing; equal for all frames."""
    geometry, encoder = model.geometry, GEOMETRY_ENCODERS.find(model.geometry.name)
    spec = asdict(encoder.read_spec(geometry))
    # Part of feature_dim and of the encoder's identity; without them, keys of features without hint stay as they were.
    del spec["scale_channels"], spec["scale_hint"]
    fields = {
        "kind": "geometry",
        "encoder": geometry.name,
        "layers": geometry.layers,
        "reference_frame": geometry.reference_frame,
        "spec": spec,
        # Nested, since an encoder may use names of the fields above.
        "identity": dict(encoder.identity(geometry)),
    }
    return encoder_identity(fields | _code_of_plugin(encoder) | _common(data, model))


def vision_identity(data: DataConfig, model: ModelConfig) -> str:
    """Hash of the vision tower, its options and its pre-processing; equal for all frames."""
    config = load_model_config(model.vlm)
    family = find_family(config.model_type)
    fields = {
        "kind": "2d",
        "model_type": config.model_type,
        "version": family.features_version,
        # Frames are resized to whole patches of the geometry encoder, and the tower gets a crop of them.
        "geometry_patch_size": GEOMETRY_ENCODERS.find(model.geometry.name).read_spec(model.geometry).patch_size,
        "config": config.vision_config.to_dict(),
        # The values are hashed: two trainings of an encoder have files of the same names and sizes.
        "weights": tensors_digest(model_weights(model.vlm), include=family.tower_weights),
        "pixels": asdict(load_vision_spec(model.vlm)),
        "visual": data.visual,
        "attention": segment_attention(model.attention, resolve_dtype(model.dtype)),
    }
    return encoder_identity(fields | _code_of_plugin(family) | _common(data, model))


def _code_of_plugin(extension: object) -> dict[str, object]:
    """Field for the code of an encoder or family of a plug-in; none for a built-in one, whose keys have versions."""
    digest = source_sha256(extension)
    return {} if digest is None else {"code": digest}


def _common(data: DataConfig, model: ModelConfig) -> dict[str, object]:
    """Fields of both keys."""
    return {"frame_width": data.frame_width, "frame_fit": data.frame_fit, "dtype": str(resolve_dtype(model.dtype))}
