"""Build the model of a configuration, and its fingerprint, by which checkpoints of other models are rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2r2_ds.config.schema import ModelConfig
from w2r2_ds.features.key import encoder_identity
from w2r2_ds.features.lookup import FeatureCache
from w2r2_ds.kernels.bind import bind_kernels
from w2r2_ds.kernels.candidates import Shapes
from w2r2_ds.kernels.measure import select_kernels
from w2r2_ds.kernels.select import resolve_attention, resolve_dtype
from w2r2_ds.models.attention.causal_sdpa import use_causal_sdpa
from w2r2_ds.models.family import VlmFamily, find_family
from w2r2_ds.models.fusion import FUSIONS, make_fusion
from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS, GeometryEncoder, geometry_spec
from w2r2_ds.models.lora import add_lora
from w2r2_ds.models.merger import make_merger
from w2r2_ds.models.merger_io import load_merger
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.models.weights.loading import load_model_config, load_tokenizer, load_vision_spec, load_vlm, meta_model
from w2r2_ds.models.weights.weights_hash import weights_identity
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.vision import VisionSpec
from w2r2_ds.utils.source_hash import source_sha256


@dataclass(frozen=True)
class VlmFrontend:
    """Tokenizer and sizes of a VLM and a geometry encoder, for the data pipeline; no weights.

    Attributes:
        tokenizer: the VLM's tokenizer, with its chat template.
        vision: patch sizes, normalisation and token ids of the VLM.
        meta: the VLM on the meta device, whose methods compute multimodal positions.
        geometry: patch size, channels and kind of input of the geometry encoder.
        cache: feature cache; None without one.
        dtype: dtype of the encoders, and so of cached features.
    """

    tokenizer: PreTrainedTokenizerBase
    vision: VisionSpec
    meta: PreTrainedModel
    geometry: GeometrySpec
    cache: FeatureCache | None = None
    dtype: torch.dtype = torch.float32

    @property
    def family(self) -> VlmFamily:
        """The VLM's family."""
        return find_family(self.meta.config.model_type)


def load_frontend(config: ModelConfig) -> VlmFrontend:
    """Load tokenizer, sizes and meta model of `model.vlm`, and sizes of `model.geometry`."""
    return VlmFrontend(
        tokenizer=load_tokenizer(config.vlm),
        vision=load_vision_spec(config.vlm),
        meta=meta_model(config.vlm),
        geometry=geometry_spec(config.geometry),
        dtype=resolve_dtype(config.dtype),
    )


def build_model(
    config: ModelConfig, device: torch.device, seed: int, saved_kernels: Mapping[str, Any] | None = None
) -> W2R2:
    """Build VLM with LoRA, geometry merger, fusion and geometry encoder; only LoRA, merger and fusion require grad.

    Collective with `model.kernels: auto`, on a GPU or with `saved_kernels`: rank 0 chooses the kernels. Under ZeRO-3
    the caller must hold an `HfDeepSpeedConfig`, so that the VLM's weights are partitioned while they load.

    Args:
        config: model configuration.
        device: device of the geometry encoder; the rest is on the CPU, or partitioned.
        seed: seed of the new weights (LoRA, merger, fusion), equal on all ranks.
        saved_kernels: kernels of the checkpoint that the run resumes from (kernels/saved_selection.py), equal on all
            ranks.

    Raises:
        ValueError: weights or configuration files are missing or do not fit, or an option is not supported.
    """
    dtype = resolve_dtype(config.dtype)
    # Before weights fill the device.
    kernels = select_kernels(config.kernels, partial(kernel_shapes, config), device, saved_kernels)
    vlm = load_vlm(config.vlm, dtype, resolve_attention(config.attention, dtype))
    text = vlm.config.get_text_config()
    hidden, attention_dropout = text.hidden_size, getattr(text, "attention_dropout", 0.0)
    if attention_dropout:
        raise ValueError(
            f"{config.vlm}/config.json: attention_dropout is {attention_dropout}; set it to 0, because the shortcut "
            "pass must have no dropout."
        )
    # All new weights are drawn from this seed, equal on all ranks. Unlike the VLM's, they are whole tensors also under
    # ZeRO-3, until `deepspeed.initialize` partitions them.
    torch.manual_seed(seed)
    peft = add_lora(vlm, config.lora_rank, config.lora_alpha, config.lora_dropout)
    family = find_family(vlm.config.model_type)
    use_causal_sdpa(family.language_model(vlm))
    # After LoRA, whose layers are among those that get a kernel.
    bind_kernels(family.language_model(vlm), kernels)
    geometry = load_geometry(config, device)
    merge_size = family.tower_sizes(vlm.config).merge_size
    merger = make_merger(geometry.spec, hidden, config.merger_hidden, merge_size).to(dtype)
    fusion = make_fusion(config.fusion, hidden).to(dtype)
    model = W2R2(peft, merger, fusion, geometry, config.zero_geometry, kernels)
    model.fingerprint = fingerprint(config)
    if config.merger:
        load_merger(model, Path(config.merger))
    return model


def kernel_shapes(config: ModelConfig) -> Shapes:
    """The sizes on which `model.kernels: auto` measures."""
    vlm = load_model_config(config.vlm)
    hidden, intermediate = vlm.get_text_config().hidden_size, find_family(vlm.model_type).mlp_width(vlm)
    return Shapes(hidden, intermediate, config.lora_rank, config.lora_dropout, resolve_dtype(config.dtype))


def load_geometry(config: ModelConfig, device: torch.device) -> GeometryEncoder:
    """Load the frozen encoder of `model.geometry`, without the rest of the model.

    Raises:
        ValueError: no encoder has this name, its weights cannot be loaded, or a layer does not exist.
    """
    spec = geometry_spec(config.geometry)
    loaded = GEOMETRY_ENCODERS.find(config.geometry.name).load(config.geometry, resolve_dtype(config.dtype), device)
    loaded.spec = spec
    return loaded


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> trainable parameter."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def plugin_code(config: ModelConfig) -> dict[str, str]:
    """Option -> SHA-256 of the code (`source_sha256`) of the parts of a model that plug-ins define."""
    parts = {
        "model.vlm": find_family(load_model_config(config.vlm).model_type),
        "model.geometry.name": GEOMETRY_ENCODERS.find(config.geometry.name),
        "model.fusion": FUSIONS.find(config.fusion),
    }
    digests = {option: source_sha256(part) for option, part in parts.items()}
    return {option: digest for option, digest in digests.items() if digest is not None}


def fingerprint(config: ModelConfig) -> dict[str, Any]:
    """Settings that two models must share, so that the trained weights of one fit the other. Saved in checkpoints.

    Raises:
        ValueError: as `load_geometry`.
    """
    vlm, geometry = load_model_config(config.vlm), config.geometry
    text, spec = vlm.get_text_config(), geometry_spec(geometry)
    hint = {} if geometry.scale_hint == "none" else {"scale_hint": geometry.scale_hint}
    # From the configuration, not from attributes of the loaded encoder: a plug-in has only those of its interface.
    return {
        "vlm_weights": weights_identity(config.vlm),
        "model_type": vlm.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "vision_depth": find_family(vlm.model_type).tower_sizes(vlm).depth,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "geometry_encoder": geometry.name,
        "geometry_layers": geometry.layers,
        "geometry_identity": encoder_identity(GEOMETRY_ENCODERS.find(geometry.name).identity(geometry)),
        "geometry_features": spec.feature_dim,
        "geometry_patch_size": spec.patch_size,
        "reference_frame": geometry.reference_frame,
        "merger_hidden": config.merger_hidden,
        "fusion": config.fusion,
        "zero_geometry": config.zero_geometry,
        **hint,
    }
