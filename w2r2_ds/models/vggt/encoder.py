"""VGGT as a geometry encoder: patch tokens of selected layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.models.attention.sdpa_backends import cudnn_sdpa
from w2r2_ds.models.flops import attention, products
from w2r2_ds.models.geometry.encoder import GeometryEncoder, register_geometry_encoder
from w2r2_ds.models.vggt.config import HEAD_SIZES, VGGTConfig
from w2r2_ds.models.vggt.loading import HEAD_PREFIXES, load_vggt, locate, read_config
from w2r2_ds.models.vggt.model import VGGT
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

    Raises:
        ValueError: a layer or the reference frame does not exist.
    """

    name = "vggt"

    def __init__(self, vggt: VGGT, layers: Sequence[int], reference_frame: str = "first") -> None:
        if reference_frame not in REFERENCE_FRAMES:
            raise ValueError(f"reference_frame is {reference_frame!r}; it is one of {', '.join(REFERENCE_FRAMES)}.")
        self.spec = spec_of(vggt.config, layers)
        self.vggt = vggt.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.reference_frame = reference_frame

    @classmethod
    def read_spec(cls, config: GeometryConfig) -> GeometrySpec:
        return spec_of(read_config(locate(config.path)), config.layers)

    @classmethod
    def identity(cls, config: GeometryConfig) -> Mapping[str, Any]:
        folder = locate(config.path)
        weights = tensors_digest(weight_files(folder), exclude=HEAD_PREFIXES)
        # Heads have no influence on the features.
        sizes = {key: value for key, value in read_config(folder).to_dict().items() if key not in HEAD_SIZES}
        return {"config": sizes, "weights": weights}

    @classmethod
    def load(cls, config: GeometryConfig, dtype: torch.dtype, device: torch.device) -> VGGTEncoder:
        encoder = cls(load_vggt(config.path), config.layers, config.reference_frame)
        encoder.vggt.to(device, dtype)
        return encoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As `GeometryEncoder.encode`, in the dtype of the weights.

        Raises:
            ValueError: see `Aggregator.forward`.
        """
        config, aggregator = self.vggt.config, self.vggt.aggregator
        images = images.to(aggregator.camera_token.device)
        # VGGT's own reference is frame 0, so that the last frame is the reference of the reversed frames.
        backwards = self.reference_frame == "last"
        # The shapes depend on the number and size of the frames only: few in a run, so that cuDNN's plans are reused.
        with cudnn_sdpa():
            by_layer = aggregator((images.flip(0) if backwards else images)[None], self.layers)
        patches = [by_layer[layer][0][:, config.special_tokens :] for layer in self.layers]
        # The features of one layer stay a view behind the special tokens: the merger copies them once, into its cells.
        tokens = torch.cat(patches, dim=-1) if len(patches) > 1 else patches[0]
        rows, _ = self.spec.grid(*images.shape[-2:])
        grid = tokens.unflatten(1, (rows, -1))
        return grid.flip(0) if backwards else grid

    def flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs of the patch embedding and of the blocks up to the deepest selected layer."""
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


def spec_of(config: VGGTConfig, layers: Sequence[int]) -> GeometrySpec:
    """Patch size, and channels of the selected layers: each has those of its frame block and of its global block.

    Raises:
        ValueError: there are no layers, or one does not exist.
    """
    if not layers or not all(0 <= layer < config.depth for layer in layers):
        raise ValueError(f"model.geometry.layers is {list(layers)}; this VGGT has layers 0 to {config.depth - 1}.")
    return GeometrySpec(config.patch_size, 2 * config.embed_dim * len(layers))
