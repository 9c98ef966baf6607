"""Compose the model of a configuration, and describe it well enough that a checkpoint of another one is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from w2r2_ds.config.schema import ModelConfig
from w2r2_ds.features.lookup import FeatureCache
from w2r2_ds.kernels.bind import bind_kernels
from w2r2_ds.kernels.select import resolve_attention, resolve_dtype, resolve_kernels
from w2r2_ds.models.family import VlmFamily, find_family
from w2r2_ds.models.fusion import fusion_name, make_fusion
from w2r2_ds.models.geometry_encoder import VGGTEncoder
from w2r2_ds.models.loading import load_tokenizer, load_vision_spec, load_vlm, meta_model
from w2r2_ds.models.lora import add_lora
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.merger_io import load_merger
from w2r2_ds.models.vggt.loading import load_vggt
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.models.weights_hash import weights_identity
from w2r2_ds.types.vision import VisionSpec


@dataclass(frozen=True)
class VlmFrontend:
    """What the CPU side needs of a VLM: no weights.

    Attributes:
        tokenizer: with the chat template.
        vision: patch sizes, normalisation, token ids.
        meta: the VLM on the meta device, for its multimodal positions.
        cache: features that need not be computed; None without a cache.
    """

    tokenizer: Any
    vision: VisionSpec
    meta: Any
    cache: FeatureCache | None = None

    @property
    def family(self) -> VlmFamily:
        """The VLM's family."""
        return find_family(self.meta.config.model_type)


def load_frontend(config: ModelConfig) -> VlmFrontend:
    """Tokenizer, vision facts and meta model of `model.vlm`."""
    return VlmFrontend(load_tokenizer(config.vlm), load_vision_spec(config.vlm), meta_model(config.vlm))


def build_model(config: ModelConfig, device: torch.device, seed: int) -> W2R2:
    """VLM with LoRA, geometry merger, fusion and VGGT; only LoRA, merger and fusion require grad.

    Under ZeRO-3 an `HfDeepSpeedConfig` must be alive, then the VLM's weights are partitioned while they load.
    """
    dtype, kernels = resolve_dtype(config.dtype), resolve_kernels(config.kernels)
    vlm = load_vlm(config.vlm, dtype, resolve_attention(config.attention, dtype))
    text = vlm.config.get_text_config()
    hidden, attention_dropout = text.hidden_size, getattr(text, "attention_dropout", 0.0)
    if attention_dropout:
        raise ValueError(
            f"{config.vlm}/config.json: attention_dropout is {attention_dropout}; set it to 0, the shortcut pass must "
            "have no dropout."
        )
    torch.manual_seed(seed)
    peft = add_lora(vlm, config.lora_rank, config.lora_alpha, config.lora_dropout)
    bind_kernels(find_family(vlm.config.model_type).language_model(vlm), kernels)
    geometry = load_geometry(config, device)
    merger = GeometryMerger(geometry.feature_dim, hidden, config.merger_hidden).to(dtype)
    fusion = make_fusion(config.fusion, hidden).to(dtype)
    model = W2R2(peft, merger, fusion, geometry, config.zero_geometry, kernels)
    model.weights = {
        "vlm_weights": weights_identity(config.vlm),
        "geometry_weights": weights_identity(config.geometry.path),
    }
    if config.merger:
        load_merger(model, Path(config.merger))
    return model


def load_geometry(config: ModelConfig, device: torch.device) -> VGGTEncoder:
    """The frozen geometry encoder alone.

    Raises:
        ValueError: a layer of `model.geometry.layers` does not exist.
    """
    geometry = config.geometry
    if geometry.name != "vggt":
        raise ValueError(f"model.geometry.name is {geometry.name!r}; the only geometry encoder is vggt.")
    vggt = load_vggt(geometry.path)
    if max(geometry.layers) >= vggt.config.depth or len(geometry.layers) > 1:
        raise ValueError(
            f"model.geometry.layers is {geometry.layers}; give one layer of {geometry.path}, 0 to "
            f"{vggt.config.depth - 1}."
        )
    encoder = VGGTEncoder(vggt, geometry.layers[0], geometry.reference_frame)
    return encoder.to(device, resolve_dtype(config.dtype))


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters, keyed by their names."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def fingerprint(model: W2R2) -> dict[str, Any]:
    """What two models must share for the trained weights of one to mean anything in the other."""
    text, vision = model.base.config.get_text_config(), model.base.config.vision_config
    lora: Any = cast(PeftModel, model.vlm).peft_config["default"]
    merger = model.geometry_merger
    return {
        **model.weights,
        "model_type": model.base.config.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "vision_depth": vision.depth,
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "geometry_features": merger.feature_dim,
        "merger_hidden": merger.mlp[0].out_features,
        "fusion": fusion_name(model.fusion),
        "geometry_layers": [model.geometry.layer],
        "reference_frame": model.geometry.reference_frame,
        "zero_geometry": model.zero_geometry,
    }
