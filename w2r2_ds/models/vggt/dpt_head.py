"""VGGT's dense heads for depth and points: a Dense Prediction Transformer (R. Ranftl et al., arXiv 2103.13413).

Patch tokens of four layers become feature maps of 4, 2, 1 and 1/2 cells per patch. They are fused from coarse to fine,
and two convolutions give values and a confidence per pixel (section 3.3 of arXiv 2503.11651). Frames do not interact.
Parameters have the names of the public checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_SCALE = 0.1
"""Factor of the position embedding relative to the features to which it is added."""
HIDDEN = 32
"""Channels of the second last convolution, for all sizes of the model."""


def position_embedding(rows: int, columns: int, channels: int, aspect: float, device: torch.device | None) -> Tensor:
    """Sine-cosine embedding of the position in the image.

    Coordinates are measured from the image's centre in units of half its diagonal. Each coordinate ``p`` gives
    ``channels / 4`` sines, then as many cosines, of ``p * 100 ** (-4 k / channels)``. The first half of the channels
    encodes the column, the second half the row.

    Args:
        rows: of the feature map.
        columns: of the feature map.
        channels: a multiple of 4.
        aspect: width of the image divided by its height.
        device: of the result.

    Returns:
        ``[channels, rows, columns]`` float32, computed in float64.
    """
    count = channels // 4
    frequencies = 100.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)

    def along(cells: int, half_side: float) -> Tensor:
        # Centres of the cells: (cells - 1) / cells of the half side from the centre of the image at most.
        end = half_side * (cells - 1) / cells
        angles = torch.linspace(-end, end, cells, dtype=torch.float64, device=device) * frequencies[:, None]
        return torch.cat((angles.sin(), angles.cos())).float()

    half_diagonal = (1 + aspect**2) ** 0.5
    column, row = along(columns, aspect / half_diagonal), along(rows, 1 / half_diagonal)
    shape = (channels // 2, rows, columns)
    return torch.cat((column[:, None, :].expand(shape), row[:, :, None].expand(shape)))


class ResidualUnit(nn.Module):
    """``conv2(relu(conv1(r))) + r`` with ``r = relu(x)``: in the public model, the skip starts after the first ReLU."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, features, h, w]`` -> the same shape."""
        x = x.relu()
        return self.conv2(self.conv1(x).relu()) + x


class FusionBlock(nn.Module):
    """Add a finer feature map to a coarser one, refine the sum and enlarge it.

    Args:
        features: channels.
        has_skip: a finer map is added; the coarsest block has none.
    """

    def __init__(self, features: int, has_skip: bool = True) -> None:
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, size: tuple[int, int], skip: Tensor | None = None) -> Tensor:
        """``[N, features, h, w]`` and a `skip` of the same shape -> ``[N, features, *size]``."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


class Scratch(nn.Module):
    """The part of the head after the four taps have become feature maps; the name is DPT's.

    Args:
        features: channels of the fused maps.
        in_channels: channels of the four maps, from fine to coarse.
        outputs: channels per pixel.
    """

    def __init__(self, features: int, in_channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        for index, channels in enumerate(in_channels, start=1):
            self.add_module(f"layer{index}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{index}", FusionBlock(features, has_skip=index < len(in_channels)))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, outputs, 1)
        )

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps from fine to coarse -> ``[N, features, 2 h, 2 w]``, where the finest has ``h x w`` cells."""
        reduced = [self.get_submodule(f"layer{index}_rn")(x) for index, x in enumerate(maps, start=1)]
        rows, columns = reduced[0].shape[-2:]
        # A block enlarges its result to the size of the next finer map, the last one by 2.
        sizes = [(2 * rows, 2 * columns), *((x.shape[-2], x.shape[-1]) for x in reduced[:-1])]
        fused = self.get_submodule("refinenet4")(reduced[3], sizes[3])
        for index in (3, 2, 1):
            fused = self.get_submodule(f"refinenet{index}")(fused, sizes[index - 1], reduced[index - 1])
        return fused


class DPTHead(nn.Module):
    """Values and a confidence per pixel.

    Args:
        dim: width of an output token of the aggregator.
        patch_size: side of a patch in pixels.
        outputs: values per pixel, without the confidence.
        activation: maps the raw values to the predicted ones.
        features: channels of the fused maps, a multiple of 8.
        out_channels: channels of the four feature maps before fusion, multiples of 4.
    """

    def __init__(
        self,
        dim: int,
        patch_size: int,
        outputs: int,
        activation: Callable[[Tensor], Tensor],
        features: int,
        out_channels: Sequence[int],
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.activation = activation
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in out_channels)
        finest, fine, _, coarse = out_channels
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(finest, finest, 4, stride=4),
                nn.ConvTranspose2d(fine, fine, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(coarse, coarse, 3, stride=2, padding=1),
            )
        )
        self.scratch = Scratch(features, out_channels, outputs + 1)

    def forward(self, taps: Sequence[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Values and confidence of every pixel.

        Args:
            taps: four tensors ``[N, patches, dim]``, the patch tokens of four layers of the aggregator.
            height: of the images, in pixels.
            width: of the images, in pixels.

        Returns:
            ``[N, height, width, outputs]``, and the confidence ``[N, height, width]``, above 1.
        """
        aspect = width / height
        maps = []
        for tokens, project, resize in zip(taps, self.projects, self.resize_layers, strict=True):
            x = self.norm(tokens).transpose(1, 2).unflatten(2, (height // self.patch_size, width // self.patch_size))
            maps.append(resize(_add_position(project(x), aspect)))
        x = _resize(self.scratch.output_conv1(self.scratch.fuse(maps)), (height, width))
        raw = self.scratch.output_conv2(_add_position(x, aspect)).permute(0, 2, 3, 1)
        return self.activation(raw[..., :-1]), 1 + raw[..., -1].exp()


def signed_expm1(x: Tensor) -> Tensor:
    """``sign(x) (exp(|x|) - 1)``, the activation of the point head."""
    return x.sign() * x.abs().expm1()


def _add_position(x: Tensor, aspect: float) -> Tensor:
    """Add the scaled position embedding to feature maps ``[N, channels, rows, columns]``."""
    channels, rows, columns = x.shape[1:]
    return x + POSITION_SCALE * position_embedding(rows, columns, channels, aspect, x.device).to(x.dtype)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of feature maps ``[N, channels, rows, columns]``, corner centres on corner centres."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
