"""VGGT (J. Wang et al., "VGGT: Visual Geometry Grounded Transformer", CVPR 2025, arXiv 2503.11651).

DINOv2 turns every frame into patch tokens. A camera token and register tokens are prepended to those of each frame.
Blocks with attention within a frame alternate with blocks with attention over all frames (alternating attention,
section 3.2 of the paper). These are the aggregator, which is all that a geometry encoder needs. The heads for cameras,
depth and points are built only on request; the head for tracks is not implemented. Parameters have the names of the
public checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from w2r2_ds.models.frame_pixels import per_channel
from w2r2_ds.models.vggt.camera_head import CameraHead
from w2r2_ds.models.vggt.config import HEADS, Head, VGGTConfig
from w2r2_ds.models.vggt.dinov2 import DinoViT
from w2r2_ds.models.vggt.dpt_head import DPTHead, signed_expm1
from w2r2_ds.models.vggt.layers import Block, PatchProjection, RotaryTable, grid_positions, rotary_table

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
EPS = 1e-5


class Aggregator(nn.Module):
    """Alternating attention within frames and over all frames.

    The output of layer ``i`` is the concatenation of the outputs of frame block ``i`` and global block ``i``.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _patch_embed(config)
        # Index 0 of the second axis: the first frame, whose camera is the world's origin. Index 1: all other frames.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, config.embed_dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.num_register_tokens, config.embed_dim))
        self.frame_blocks = _blocks(config)
        self.global_blocks = _blocks(config)
        nn.init.normal_(self.camera_token, std=1e-6)
        nn.init.normal_(self.register_token, std=1e-6)

    def patch_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> ``[N, patches, embed_dim]`` in the dtype of the weights."""
        mean, std = (per_channel(values, images.device, images.dtype) for values in (PIXEL_MEAN, PIXEL_STD))
        return self.patch_embed(((images - mean) / std).to(self.camera_token.dtype))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, S, 3, H, W]`` -> ``[B * S, special + patches, embed_dim]``, the input of frame block 0."""
        batch, frames = images.shape[:2]
        patches = self.patch_tokens(images.flatten(0, 1))
        # The reference frame has special tokens of its own; all other frames share theirs.
        first, other = torch.cat((self.camera_token, self.register_token), dim=2).split(1, dim=1)
        # Not an index of a list, which would be copied to the device and make the host wait.
        special = torch.cat((first, other.expand(-1, frames - 1, -1, -1)), dim=1)
        special = special.expand(batch, -1, -1, -1).flatten(0, 1)
        return torch.cat((special.to(patches.dtype), patches), dim=1)

    def positions(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """``[special + patches, 2]`` int64 (row, column) of a frame: special tokens at (0, 0), patches from (1, 1)."""
        size = self.config.patch_size
        patches = 1 + grid_positions(height // size, width // size, device)
        return torch.cat((patches.new_zeros(self.config.special_tokens, 2), patches))

    def rope(self, positions: torch.Tensor) -> RotaryTable | None:
        """Rotary table of ``[..., tokens, 2]`` positions; None if `rope_freq` is 0."""
        head_dim = self.config.embed_dim // self.config.num_heads
        return rotary_table(positions, head_dim, self.config.rope_freq) if self.config.rope_freq else None

    def forward(self, images: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Outputs of the selected layers; blocks after the deepest selected layer do not run.

        Args:
            images: ``[B, S, 3, H, W]`` floating, RGB in [0, 1]; frame 0 is the reference. H and W are multiples of
                the patch size.
            layers: absolute layer indices, each in ``0 .. depth - 1``.

        Returns:
            Layer index -> ``[B, S, special + patches, 2 * embed_dim]`` in the dtype of the weights.

        Raises:
            ValueError: the images have a wrong shape, size or dtype, there are no layers, or a layer does not exist.
        """
        self._check(images, layers)
        batch, frames, _, height, width = images.shape
        positions = self.positions(height, width, images.device)
        frame_rope, global_rope = self.rope(positions), self.rope(positions.repeat(frames, 1))
        tokens = self.tokens(images)
        outputs: dict[int, torch.Tensor] = {}
        for index in range(max(layers) + 1):
            # Tokens are [B * S, N, C] for attention within a frame and [B, S * N, C] for attention over all frames.
            within = self.frame_blocks[index](tokens, frame_rope)
            across = self.global_blocks[index](within.unflatten(0, (batch, frames)).flatten(1, 2), global_rope)
            tokens = across.unflatten(1, (frames, -1)).flatten(0, 1)
            if index in layers:
                outputs[index] = torch.cat((within, tokens), dim=-1).unflatten(0, (batch, frames))
        return outputs

    def _check(self, images: torch.Tensor, layers: Sequence[int]) -> None:
        """Raise ValueError as documented in `forward`."""
        size, depth = self.config.patch_size, self.config.depth
        if images.dim() != 5 or images.shape[2] != 3 or 0 in images.shape:
            raise ValueError(f"VGGT: images have shape {tuple(images.shape)}; give [batch, frames, 3, height, width].")
        if not images.is_floating_point():
            raise ValueError(f"VGGT: images are {images.dtype}; give floating point values in [0, 1].")
        height, width = images.shape[-2:]
        if height % size or width % size:
            raise ValueError(
                f"VGGT: frames are {height} x {width} pixels; height and width must be multiples of {size}."
            )
        if not layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"VGGT: layers are {list(layers)}; give one or more of 0 to {depth - 1}.")


def _patch_embed(config: VGGTConfig) -> nn.Module:
    """Patch embedding: a DINOv2 ViT or one convolution."""
    if config.patch_embed == "conv":
        return PatchProjection(config.patch_size, config.embed_dim)
    return DinoViT(
        config.img_size,
        config.patch_size,
        config.embed_dim,
        config.vit_depth,
        config.vit_num_heads,
        config.vit_mlp_ratio,
        config.num_register_tokens,
    )


def _blocks(config: VGGTConfig) -> nn.ModuleList:
    """The frame blocks or the global blocks of all layers."""
    return nn.ModuleList(
        Block(
            config.embed_dim,
            config.num_heads,
            config.mlp_ratio,
            eps=EPS,
            initial_scale=0.01,
            qk_norm=config.qk_norm,
        )
        for _ in range(config.depth)
    )


class VGGT(nn.Module):
    """The aggregator and the requested heads, with the parameter names of the public checkpoint.

    `models/vggt/predictions.py` runs the heads.

    Args:
        config: sizes.
        heads: heads to build; none for a geometry encoder.

    Raises:
        ValueError: a head does not exist, or its sizes do not fit (see `VGGTConfig.check_heads`).
    """

    def __init__(self, config: VGGTConfig, heads: Collection[Head] = ()) -> None:
        super().__init__()
        if unknown := set(heads) - set(HEADS):
            raise ValueError(f"VGGT has no head {', '.join(sorted(unknown))}; there are {', '.join(HEADS)}.")
        if heads:
            config.check_heads()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = _camera_head(config) if "camera" in heads else None
        self.depth_head = _dpt_head(config, 1, torch.exp) if "depth" in heads else None
        self.point_head = _dpt_head(config, 3, signed_expm1) if "point" in heads else None

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that were built."""
        return tuple(head for head in HEADS if getattr(self, f"{head}_head") is not None)


def _camera_head(config: VGGTConfig) -> CameraHead:
    """The camera head on the tokens of the last layer."""
    return CameraHead(2 * config.embed_dim, config.camera_trunk_depth, config.camera_num_heads)


def _dpt_head(config: VGGTConfig, outputs: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> DPTHead:
    """A head with `outputs` values per pixel on the patch tokens of `dpt_layers`."""
    return DPTHead(
        2 * config.embed_dim, config.patch_size, outputs, activation, config.dpt_features, config.dpt_out_channels
    )
