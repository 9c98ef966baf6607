"""Resample geometry features to the patch grid of the vision tower."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def resample_to_patches(features: Tensor, geometry_patch: int, tower_patch: int, merge_size: int) -> Tensor:
    """Interpolate geometry features bilinearly at the centres of the vision tower's patches.

    Both grids begin at the upper left pixel of the resized frame. The geometry grid covers the whole frame, ``h *
    geometry_patch`` by ``w * geometry_patch`` pixels. The tower's grid covers the crop of the frame that is the tower's
    input: as many cells of `merge_size` by `merge_size` patches as fit (`frame_pixels.even_crop`). A feature lies at
    the centre of its patch, so row i of the tower is row ``(i + 1/2) * tower_patch / geometry_patch - 1/2`` of the
    features. Beyond the centres of the outer features, the value of the outer feature is used.

    Args:
        features: ``[frames, h, w, channels]``.
        geometry_patch: side in pixels of the image patch of a feature.
        tower_patch: side in pixels of a patch of the vision tower.
        merge_size: patches per side that the tower merges into one token.

    Returns:
        ``[frames, rows, columns, channels]`` in the same dtype, interpolated in float32. With equal patch sizes
        `features` itself, of which the merger crops the rows and columns outside the tower's crop.
    """
    if geometry_patch == tower_patch:
        return features
    centres = []  # of the tower's patches, vertically and horizontally
    for count in features.shape[1:3]:
        pixels = count * geometry_patch
        patches = pixels // (tower_patch * merge_size) * merge_size
        # In pixels the centre of patch i is (i + 1/2) * tower_patch. grid_sample (align_corners=False) maps [-1, 1] to
        # the outer edges of the grid, 0 to `pixels`.
        centres.append((torch.arange(patches, device=features.device) + 0.5) * (2 * tower_patch / pixels) - 1)
    y, x = torch.meshgrid(*centres, indexing="ij")
    # grid_sample expects (x, y) in the last dimension, and channels before rows and columns.
    positions = torch.stack([x, y], dim=-1).expand(len(features), -1, -1, -1)
    channels_first = features.float().permute(0, 3, 1, 2)
    sampled = grid_sample(channels_first, positions, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1).to(features.dtype)
