"""Geometry merger: maps a grid of geometry features to one token per visual token of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import rms_norm

from w2r2_ds.types.geometry import GeometrySpec

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
        scale_channels: channels behind the `feature_dim` ones that code the metric scale of a frame set
            (`GeometrySpec.scale_channels`). A linear map of them, zero at first, is added to the tokens.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        merger_hidden: int = 4096,
        merge_size: int = 2,
        init_std: float = 0.02,
        scale_channels: int = 0,
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
        self.scale_hint: nn.Linear | None = None
        if scale_channels:
            # Without bias: the code is 0 without measured depth and for zeroed geometry, which then get no hint.
            self.scale_hint = nn.Linear(scale_channels, hidden_size, bias=False)
            nn.init.zeros_(self.scale_hint.weight)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merge grids ``[frames, h, w, channels]``, one per frame set, to ``[tokens, hidden_size]``.

        The channels are `feature_dim` and then `scale_channels`.

        A grid gives ``frames * (h // m) * (w // m)`` tokens: rows and columns at the bottom and the right that do not
        fill a merge cell are cropped. Tokens are in the vision tower's order: frame set, frame, row, column. Features
        are cast to the weights' dtype; the result has that dtype.

        Every submodule is called once, for any number of grids, also for none: ZeRO-3 needs the same calls on every
        rank.

        Raises:
            ValueError: a grid has another number of dimensions or channels, or is smaller than one merge cell.
        """
        expected = self.feature_dim + (0 if self.scale_hint is None else self.scale_hint.in_features)
        for grid in features:
            if grid.dim() != 4 or grid.shape[-1] != expected:
                raise ValueError(
                    f"geometry merger: features are {tuple(grid.shape)}, expected [frames, h, w, {expected}]"
                )
        merged: torch.Tensor = self.mlp(self.ln_q([grid[..., : self.feature_dim] for grid in features]).flatten(1))
        return merged if self.scale_hint is None else merged + self._hint(features, self.scale_hint)

    def _hint(self, features: Sequence[torch.Tensor], scale_hint: nn.Linear) -> torch.Tensor:
        """``[tokens, hidden_size]``, equal for all tokens of a frame set."""
        # One row of the linear map per frame set, expanded to its tokens. The empty one stands for no grids.
        codes = [scale_hint.weight.new_empty(0, scale_hint.in_features)]
        codes += [grid[0, 0, 0, self.feature_dim :][None].to(scale_hint.weight.dtype) for grid in features]
        rows = scale_hint(torch.cat(codes))
        counts = [split_cells(grid, self.merge_size).shape[:3].numel() for grid in features]
        return torch.cat([rows[:0], *(row.expand(n, -1) for row, n in zip(rows, counts, strict=True))])


def make_merger(spec: GeometrySpec, hidden_size: int, merger_hidden: int, merge_size: int = 2) -> GeometryMerger:
    """A freshly initialised merger for the features of a geometry encoder; see `GeometryMerger`."""
    feature_dim = spec.feature_dim - spec.scale_channels
    return GeometryMerger(feature_dim, hidden_size, merger_hidden, merge_size, scale_channels=spec.scale_channels)


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
