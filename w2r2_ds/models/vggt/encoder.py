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
from w2r2_ds.models.vggt.cameras import camera_to_world, decode_pose
from w2r2_ds.models.vggt.config import HEAD_SIZES, Head, VGGTConfig
from w2r2_ds.models.vggt.loading import HEAD_PREFIXES, check_heads, load_vggt, locate, read_config
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import FRAMES_AT_ONCE, run_dense_head
from w2r2_ds.models.vggt.scale_hint import CHANNELS, at_patch_centres, log_scale, log_scale_of_centres, scale_code
from w2r2_ds.models.weights.weights_hash import tensors_digest
from w2r2_ds.types.geometry import GeometrySpec, ScaleHint
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
        scale_hint: ``"none"``; with ``"depth"`` or ``"poses"``, `encode_frames` appends the code of the scene's metric
            scale (`scale_hint.py`). The model then has the depth head or the camera head.

    Raises:
        ValueError: a layer or the reference frame does not exist.
    """

    name = "vggt"
    scale_hints = ("none", "depth", "poses")

    def __init__(
        self, vggt: VGGT, layers: Sequence[int], reference_frame: str = "first", scale_hint: ScaleHint = "none"
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
        vggt.to(device)  # the head of the scale hint stays in float32
        return encoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As `GeometryEncoder.encode`, in the dtype of the weights; without the channels of the scale hint.

        Raises:
            ValueError: see `Aggregator.forward`.
        """
        return self._features(images, self._aggregate(images, self.layers))

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, scale_reference: Tensor | None = None) -> Tensor:
        """As `GeometryEncoder.encode_frames`; with a scale hint the aggregator runs once for features and heads."""
        if self.spec.scale_hint == "none":
            return super().encode_frames(frames)
        assert scale_reference is not None, "required by the scale hint"
        config, images, hint = self.vggt.config, unit_range(frames), self.spec.scale_hint
        used = config.dpt_layers if hint == "depth" else (config.depth - 1,)
        by_layer = self._aggregate(images, sorted({*self.layers, *used}))
        features = self._features(images, by_layer)
        if hint == "depth":
            predicted = self._patch_depth(by_layer, images)
            scale = log_scale(scale_reference.to(predicted.device), predicted)
        else:
            predicted = self._camera_centres(by_layer, images)
            scale = log_scale_of_centres(scale_reference.to(predicted.device), predicted)
        code = scale_code(scale).to(features.dtype)
        return torch.cat([features, code.expand(*features.shape[:3], -1)], dim=-1)

    def _patch_depth(self, by_layer: Mapping[int, Tensor], images: Tensor) -> Tensor:
        """Predicted depth at patch centres, ``[frames, rows, columns]``, from the result of `_aggregate`."""
        config, head = self.vggt.config, self.vggt.depth_head
        assert head is not None, "required by the scale hint"
        taps = [by_layer[layer][0][:, config.special_tokens :] for layer in config.dpt_layers]
        depth, _ = run_dense_head(head, taps, images.shape[-2:], FRAMES_AT_ONCE)
        return self._in_order(at_patch_centres(depth[..., 0], config.patch_size))

    def _camera_centres(self, by_layer: Mapping[int, Tensor], images: Tensor) -> Tensor:
        """Predicted camera centres ``[frames, 3]`` in the reference frame's camera, from the result of `_aggregate`."""
        head = self.vggt.camera_head
        assert head is not None, "required by the scale hint"
        tokens = by_layer[self.vggt.config.depth - 1][:, :, 0].to(head.token_norm.weight.dtype)
        _, world_to_camera = decode_pose(head(tokens)[-1, 0], *images.shape[-2:])
        return self._in_order(camera_to_world(world_to_camera)[:, :3, 3])

    def _in_order(self, by_frame: Tensor) -> Tensor:
        """Rows of the frames in the order of the input; `_aggregate` puts the reference frame first."""
        return by_frame.flip(0) if self.reference_frame == "last" else by_frame

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
        return self._in_order(grid)

    def flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs of the patch embedding and of the blocks up to the deepest selected layer, without the heads."""
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


def heads_of(scale_hint: ScaleHint) -> tuple[Head, ...]:
    """The heads that `model.geometry.scale_hint` needs."""
    heads: dict[ScaleHint, tuple[Head, ...]] = {"none": (), "depth": ("depth",), "poses": ("camera",)}
    return heads[scale_hint]


def spec_of(config: VGGTConfig, layers: Sequence[int], scale_hint: ScaleHint = "none") -> GeometrySpec:
    """Patch size, and channels of the selected layers: each has those of its frame block and of its global block.

    Raises:
        ValueError: there are no layers, or one does not exist.
    """
    if not layers or not all(0 <= layer < config.depth for layer in layers):
        raise ValueError(f"model.geometry.layers is {list(layers)}; this VGGT has layers 0 to {config.depth - 1}.")
    scale_channels = CHANNELS if scale_hint != "none" else 0
    feature_dim = 2 * config.embed_dim * len(layers) + scale_channels
    return GeometrySpec(config.patch_size, feature_dim, scale_channels=scale_channels, scale_hint=scale_hint)
