"""Geometry merger: maps a grid of geometry features to one token per visual token of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import rms_norm

EPS = 1e-6
"""Epsilon of the merger's RMSNorm, as in VG-LLM."""


class GeometryMerger(nn.Module):
    """RMSNorm, merge of 2 x 2 patches, Linear, GELU, Linear: VG-LLM's merger, with its names and initialisation.

    Args:
        feature_dim: channels of a geometry feature (2048 for one layer of VGGT).
        hidden_size: width of the language model.
        merger_hidden: width between the two linear layers.
        merge_size: patches per side that become one token, as in the vision tower.
        init_std: standard deviation of the initial linear weights; biases start at zero.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        merger_hidden: int = 4096,
        merge_size: int = 2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.merge_size = merge_size
        self.ln_q = CellNorm(feature_dim, merge_size)
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim * merge_size**2, merger_hidden),
            nn.GELU(),
            nn.Linear(merger_hidden, hidden_size),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merge grids ``[frames, h, w, feature_dim]``, one per frame set, to ``[tokens, hidden_size]``.

        A grid gives ``frames * (h // m) * (w // m)`` tokens: rows and columns at the bottom and the right that do not
        fill a merge cell are cropped. Tokens are in the vision tower's order: frame set, frame, row, column. Features
        are cast to the weights' dtype; the result has that dtype.

        Every submodule is called once, for any number of grids, also for none: ZeRO-3 needs the same calls on every
        rank.

        Raises:
            ValueError: a grid has another number of dimensions or channels, or is smaller than one merge cell.
        """
        for grid in features:
            if grid.dim() != 4 or grid.shape[-1] != self.feature_dim:
                raise ValueError(
                    f"geometry merger: features are {tuple(grid.shape)}, expected [frames, h, w, {self.feature_dim}]"
                )
        merged: torch.Tensor = self.mlp(self.ln_q(features).flatten(1))
        return merged


class CellNorm(nn.Module):
    """RMSNorm of the features of all grids, grouped into merge cells."""

    # A module of its own: ZeRO-3 gathers a weight in the hooks of the module that owns it.

    def __init__(self, feature_dim: int, merge_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(feature_dim))
        self.merge_size = merge_size

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Grids ``[frames, h, w, feature_dim]`` -> ``[tokens, merge_size ** 2, feature_dim]`` in the weight's dtype."""
        grids = [split_cells(grid, self.merge_size) for grid in features]
        counts = [grid.shape[:3].numel() for grid in grids]  # tokens of a grid
        # The features are copied once: grouping, concatenation and cast in one write, straight from the strided view
        # behind the encoder's special tokens. Without any grid the norm still runs, and its weight gets a gradient.
        cells = self.weight.new_empty(sum(counts), self.merge_size**2, len(self.weight))
        for grid, count, end in zip(grids, counts, accumulate(counts), strict=True):
            cells[end - count : end].view(grid.shape).copy_(grid)
        return rms_norm(cells, (len(self.weight),), self.weight, EPS)


def split_cells(features: torch.Tensor, merge_size: int) -> torch.Tensor:
    """View of ``[frames, h, w, C]`` as cells ``[frames, h // m, w // m, m, m, C]``; crops bottom and right.

    Raises:
        ValueError: the grid is smaller than one cell.
    """
    height, width = features.shape[1:3]
    rows, columns = height // merge_size, width // merge_size
    if rows == 0 or columns == 0:
        raise ValueError(f"geometry merger: a {height} x {width} grid holds no {merge_size} x {merge_size} cell")
    cropped = features[:, : rows * merge_size, : columns * merge_size]
    # [frame, cell row, row in cell, cell column, column in cell, channel]
    split = cropped.unflatten(1, (rows, merge_size)).unflatten(3, (columns, merge_size))
    return split.transpose(2, 3)


def pair_frames(features: torch.Tensor) -> torch.Tensor:
    """Mean of consecutive frames in pairs, ``[frames, h, w, C]`` -> ``[ceil(frames / 2), h, w, C]``, same dtype.

    A temporal patch of a video covers two frames. An odd last frame is paired with itself, as in the pre-processing of
    the vision tower. The mean is computed in float32.

    Raises:
        ValueError: another number of dimensions, or no frames.
    """
    if features.dim() != 4 or features.shape[0] == 0:
        raise ValueError(f"geometry features are {tuple(features.shape)}, expected [frames >= 1, h, w, channels]")
    count = features.shape[0]
    # With `dtype` the sum is float32 without a float32 copy of the features.
    pairs = features[: count - count % 2].unflatten(0, (-1, 2)).mean(1, dtype=torch.float32).to(features.dtype)
    return torch.cat([pairs, features[-1:]]) if count % 2 else pairs
