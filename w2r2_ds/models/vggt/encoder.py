"""VGGT as a geometry encoder: patch tokens of selected layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.attention.sdpa_backends import cudnn_sdpa
from w2r2_ds.models.flops import attention, products
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.geometry.encoder import GeometryEncoder, register_geometry_encoder
from w2r2_ds.models.vggt.config import HEAD_SIZES, Head, VGGTConfig
from w2r2_ds.models.vggt.loading import HEAD_PREFIXES, check_heads, load_vggt, locate, read_config
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import FRAMES_AT_ONCE, run_dense_head
from w2r2_ds.models.vggt.scale_hint import CHANNELS, at_patch_centres, log_scale, scale_code
from w2r2_ds.models.weights.weights_hash import tensors_digest
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.utils.files.safetensors_io import weight_files

REFERENCE_FRAMES = ("first", "last")


@register_geometry_encoder
class VGGTEncoder(GeometryEncoder):
    """Patch tokens of selected layers of a frozen VGGT.

    Args:
        vggt: the model; set to eval mode and frozen in place.
        layers: absolute layer indices, ``0 .. depth - 1``.
        reference_frame: ``"first"``, or ``"last"``: VGGT gets the frames in reverse order, and the features are
            returned in the order of the input.
        scale_hint: ``"none"``, or ``"depth"``: `encode_frames` appends the code of the scene's metric scale
            (`scale_hint.py`). The model then has the depth head.

    Raises:
        ValueError: a layer or the reference frame does not exist.
    """

    name = "vggt"
    scale_hints = ("none", "depth")

    def __init__(
        self, vggt: VGGT, layers: Sequence[int], reference_frame: str = "first", scale_hint: str = "none"
    ) -> None:
        if reference_frame not in REFERENCE_FRAMES:
            raise ValueError(f"reference_frame is {reference_frame!r}; it is one of {', '.join(REFERENCE_FRAMES)}.")
        self.spec = spec_of(vggt.config, layers, scale_hint)
        self.vggt = vggt.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.reference_frame = reference_frame

    @classmethod
    def read_spec(cls, config: GeometryConfig) -> GeometrySpec:
        folder = locate(config.path)
        if heads := heads_of(config.scale_hint):
            check_heads(folder, heads)
        return spec_of(read_config(folder), config.layers, config.scale_hint)

    @classmethod
    def identity(cls, config: GeometryConfig) -> Mapping[str, Any]:
        folder = locate(config.path)
        values, used = read_config(folder).to_dict(), heads_of(config.scale_hint)
        unused = tuple(prefix for prefix in HEAD_PREFIXES if prefix not in [f"{head}_head." for head in used])
        weights = tensors_digest(weight_files(folder), exclude=unused)
        if used:
            return {"config": values, "weights": weights, "scale_hint": config.scale_hint}
        # Heads have no influence on the features.
        return {"config": {key: value for key, value in values.items() if key not in HEAD_SIZES}, "weights": weights}

    @classmethod
    def load(cls, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> VGGTEncoder:
        vggt = load_vggt(config.path, heads_of(config.scale_hint))
        encoder = cls(vggt, config.layers, config.reference_frame, config.scale_hint)
        vggt.aggregator.to(device, dtype)
        vggt.to(device)  # the depth head stays in float32
        return encoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As `GeometryEncoder.encode`, in the dtype of the weights; without the channels of the scale hint.

        Raises:
            ValueError: see `Aggregator.forward`.
        """
        return self._features(images, self._aggregate(images, self.layers))

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, metric_depth: Tensor | None = None) -> Tensor:
        """As `GeometryEncoder.encode_frames`; with a scale hint the aggregator runs once for features and depth."""
        if not self.spec.needs_depth:
            return super().encode_frames(frames)
        assert metric_depth is not None and self.vggt.depth_head is not None, "required by the scale hint"
        config, images = self.vggt.config, unit_range(frames)
        by_layer = self._aggregate(images, sorted({*self.layers, *config.dpt_layers}))
        features = self._features(images, by_layer)
        taps = [by_layer[layer][0][:, config.special_tokens :] for layer in config.dpt_layers]
        depth, _ = run_dense_head(self.vggt.depth_head, taps, images.shape[-2:], FRAMES_AT_ONCE)
        if self.reference_frame == "last":
            depth = depth.flip(0)
        predicted = at_patch_centres(depth[..., 0], config.patch_size)
        code = scale_code(log_scale(metric_depth.to(predicted.device), predicted)).to(features.dtype)
        return torch.cat([features, code.expand(*features.shape[:3], -1)], dim=-1)

    def _aggregate(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of layers, ``[1, frames, special + patches, 2 * embed_dim]``, the reference frame first."""
        aggregator = self.vggt.aggregator
        images = images.to(aggregator.camera_token.device)
        # VGGT's own reference is frame 0, so that the last frame is the reference of the reversed frames.
        backwards = self.reference_frame == "last"
        # The shapes depend on the number and size of the frames only: few in a run, so that cuDNN's plans are reused.
        with cudnn_sdpa():
            outputs: dict[int, Tensor] = aggregator((images.flip(0) if backwards else images)[None], layers)
        return outputs

    def _features(self, images: Tensor, by_layer: Mapping[int, Tensor]) -> Tensor:
        """The grid of the selected layers, in the order of `images`, from the result of `_aggregate`."""
        patches = [by_layer[layer][0][:, self.vggt.config.special_tokens :] for layer in self.layers]
        # The features of one layer stay a view behind the special tokens: the merger copies them once, into its cells.
        tokens = torch.cat(patches, dim=-1) if len(patches) > 1 else patches[0]
        rows, _ = self.spec.grid(*images.shape[-2:])
        grid = tokens.unflatten(1, (rows, -1))
        return grid.flip(0) if self.reference_frame == "last" else grid

    def flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs of the patch embedding and of the blocks up to the deepest selected layer, without the depth head."""
        config, aggregator = self.vggt.config, self.vggt.aggregator
        rows, columns = self.spec.grid(height, width)
        patches = rows * columns
        # The ViT has the same number of tokens per frame, with a class token in place of the camera token.
        tokens = patches + config.special_tokens
        frame_attention = attention(config.embed_dim, frames * tokens**2).forward
        global_attention = attention(config.embed_dim, (frames * tokens) ** 2).forward
        linear = products(aggregator.frame_blocks[0], frames * tokens).forward  # a global block has the same sizes
        blocks = (max(self.layers) + 1) * (2 * linear + frame_attention + global_attention)
        if config.patch_embed == "conv":
            return blocks + products(aggregator.patch_embed, frames * patches).forward
        vit: Any = aggregator.patch_embed
        vit_block = products(vit.blocks[0], frames * tokens).forward + frame_attention
        return blocks + products(vit.patch_embed, frames * patches).forward + config.vit_depth * vit_block


def heads_of(scale_hint: str) -> tuple[Head, ...]:
    """The heads that `model.geometry.scale_hint` needs."""
    return ("depth",) if scale_hint == "depth" else ()


def spec_of(config: VGGTConfig, layers: Sequence[int], scale_hint: str = "none") -> GeometrySpec:
    """Patch size, and channels of the selected layers: each has those of its frame block and of its global block.

    Raises:
        ValueError: there are no layers, or one does not exist.
    """
    if not layers or not all(0 <= layer < config.depth for layer in layers):
        raise ValueError(f"model.geometry.layers is {list(layers)}; this VGGT has layers 0 to {config.depth - 1}.")
    scale_channels = CHANNELS if scale_hint != "none" else 0
    feature_dim = 2 * config.embed_dim * len(layers) + scale_channels
    return GeometrySpec(config.patch_size, feature_dim, scale_channels=scale_channels)
