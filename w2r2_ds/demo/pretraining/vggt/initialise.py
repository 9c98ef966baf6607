"""Sizes and initial weights of the tiny VGGT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from w2r2_ds.demo.pretraining.vggt.room_views import VIEWS, Choice, RoomViews
from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.model import PIXEL_MEAN, PIXEL_STD, VGGT

CONFIG = VGGTConfig(
    img_size=112,
    embed_dim=128,
    depth=4,
    num_heads=4,
    mlp_ratio=3.0,
    vit_depth=2,
    vit_num_heads=4,
    vit_mlp_ratio=3.0,
    camera_trunk_depth=1,
    camera_num_heads=4,
    dpt_features=16,
    dpt_out_channels=(16, 16, 32, 32),
    dpt_layers=(0, 1, 2, 3),
)
FIRST_ROOMS = 8
"""Rooms whose patches give the patch embedding."""
LAYER_SCALE = 0.3
NOISE = 0.02
"""Variance that is added before whitening, relative to the mean of the kept variances: small components are noise."""


@torch.no_grad()
def initialise(vggt: VGGT, rooms: RoomViews) -> None:
    """Initial weights for a small model with ``patch_embed: dinov2`` that is trained from scratch.

    LayerScales of 0.01 and special tokens of 1e-6, as in the public code, suit a deep model on a pretrained ViT. Here
    they are 0.3 and 0.02. The patch embedding becomes the whitened principal components of patches.
    """
    for name, parameter in vggt.named_parameters():
        if name.endswith(".gamma"):
            parameter.fill_(LAYER_SCALE)
        elif name.startswith("aggregator.") and name.endswith(("_token", "_tokens")):
            parameter.normal_(std=0.02)
    projection = vggt.get_submodule("aggregator.patch_embed.patch_embed.proj")
    assert isinstance(projection, nn.Conv2d) and projection.bias is not None
    weight, bias = whitening(rooms, vggt.config.patch_size, vggt.config.embed_dim)
    projection.weight.copy_(weight)
    projection.bias.copy_(bias)


def whitening(rooms: RoomViews, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Weight ``[channels, 3, size, size]`` and bias that map patches to their first whitened principal components.

    Args:
        rooms: all views of the first `FIRST_ROOMS` rooms are used.
        size: side of a patch in pixels.
        channels: number of components.
    """
    images = rooms.batch([Choice(room, tuple(range(VIEWS))) for room in range(FIRST_ROOMS)]).images
    images = images.flatten(0, 1).double()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    patches = unfold((images - mean) / std, size, stride=size).mT.flatten(0, 1)
    centre = patches.mean(0)
    variance, axes = torch.linalg.eigh((patches - centre).T @ (patches - centre) / len(patches))
    variance, axes = variance.flip(0)[:channels], axes.flip(1)[:, :channels]
    # The sign of an axis is arbitrary: make its largest entry positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    weight = (axes / (variance + NOISE * variance.mean()).sqrt()).T
    return weight.unflatten(1, (3, size, size)).float(), -(weight @ centre).float()
