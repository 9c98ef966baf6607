"""Fusions Phi(F2D, G) of visual tokens with merged geometry tokens, selected by `model.fusion`.

A fusion is one class and one entry of `FUSIONS`. `add` is the fusion of VG-LLM; the others are alternatives of its
later versions (its 4B model on ScanRefer, Acc@0.25: none 31.9, add 36.4, cross-attention 33.7, concat 27.7). Each
docstring gives the formula, the differences from that source, the initialisation, and Phi(F2D, 0). The *stock VLM* is
the unchanged model, which answers from F2D.

Every submodule is called once per pass, independent of the number of images: under ZeRO-3 all ranks must make the same
calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from w2r2_ds.utils.registry import Registry

INIT_STD = 0.02
NUM_HEADS = 8


class Fusion(nn.Module, ABC):
    """Base class of fusions Phi(F2D, G), with G the output of the geometry merger.

    Args:
        hidden_size: width of the language model.
    """

    zero_is_stock: ClassVar[bool] = True
    """Whether Phi(F2D, 0) is F2D for all weights. It is then returned unchanged, bit for bit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, visual: torch.Tensor, geometry: torch.Tensor | None, sizes: Sequence[int]) -> torch.Tensor:
        """Fuse the tokens of a batch, in the dtype of the weights.

        Args:
            visual: ``[tokens, hidden]``, F2D after the vision tower's own merger.
            geometry: ``[tokens, hidden]``, output of `GeometryMerger` in the same order; None computes Phi(F2D, 0).
            sizes: number of tokens of every image (or pair of video frames), in order; may be 0.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``visual``.

        Raises:
            ValueError: `visual` and `geometry` have different shapes.
        """
        assert sum(sizes) == len(visual), f"{sum(sizes)} tokens in {len(sizes)} images, but {len(visual)} tokens"
        if geometry is None:
            if self.zero_is_stock:
                return visual
            geometry = torch.zeros_like(visual)
        check_same_tokens(visual.shape, geometry.shape)
        dtype = next(self.parameters(), visual).dtype
        return self.combine(visual.to(dtype), geometry.to(dtype), sizes).to(visual.dtype)

    @abstractmethod
    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The formula on ``[tokens, hidden]`` tensors of one dtype."""


def check_same_tokens(visual: torch.Size, geometry: torch.Size) -> None:
    """Raise ValueError unless both shapes are equal."""
    if visual != geometry:
        raise ValueError(
            f"fusion: the vision grid is {tuple(visual)} [tokens, hidden] but the geometry grid is {tuple(geometry)}; "
            "both encoders need frames of the same size and order"
        )


class Add(Fusion):
    """F2D + G, VG-LLM's fusion; no parameters. Phi(F2D, 0) is the stock VLM."""

    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return visual + geometry


class Concat(Fusion):
    """W [LayerNorm(F2D), LayerNorm(G)] + b with one Linear(2H -> H), as in VG-LLM's later versions; no residual.

    LayerNorm removes the mean and the scale of every token and there is no residual, so no weights give the stock VLM:
    Phi(F2D, 0) = W [LayerNorm(F2D), beta] + b, where beta is the bias of G's LayerNorm. The shortcut pass of W2R2 then
    depends on weights that are trained, and is not the pretrained VLM.

    Initialisation: W = [identity, normal(0, 0.02)], b = 0. The fused model starts from LayerNorm(F2D), which is as
    close to the stock VLM as the formula gets, plus a random projection of the geometry. VG-LLM starts from a random W
    and trains the whole language model; a frozen language model could not use such visual tokens.
    """

    zero_is_stock = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.norm_visual = nn.LayerNorm(hidden_size)
        self.norm_geometry = nn.LayerNorm(hidden_size)
        self.projection = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.normal_(self.projection.weight, std=INIT_STD)
        nn.init.zeros_(self.projection.bias)
        with torch.no_grad():
            self.projection.weight[:, :hidden_size] = torch.eye(hidden_size)

    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        both = torch.cat([self.norm_visual(visual), self.norm_geometry(geometry)], dim=-1)
        projected: torch.Tensor = self.projection(both)
        return projected


class Gated(Fusion):
    """F2D + g * G with g = sigmoid(W [LayerNorm(F2D), LayerNorm(G)] + b), a gate per token and channel.

    The gate is that of VG-LLM's later versions and of GeoSR (arXiv 2603.26639, Geometry-Guided Fusion). They use
    g * LayerNorm(F2D) + (1 - g) * LayerNorm(G), which cannot give the stock VLM. Here the gate scales the geometry only
    and F2D is added unchanged, so that Phi(F2D, 0) is the stock VLM for all weights.

    Initialisation: W = 0 and b = 0, hence g = 1/2 everywhere: `add` with half the geometry. W and the geometry merger
    have a gradient from the first step.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.norm_visual = nn.LayerNorm(hidden_size)
        self.norm_geometry = nn.LayerNorm(hidden_size)
        self.gate = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        both = torch.cat([self.norm_visual(visual), self.norm_geometry(geometry)], dim=-1)
        return visual + torch.sigmoid(self.gate(both)) * geometry


class CrossAttention(Fusion):
    """F2D + O softmax(Q K' / sqrt(d)) V within every image: queries from F2D, keys and values from G.

    Q = Wq (RMSNorm(F2D) + p), K = Wk (RMSNorm(G) + p), V = Wv RMSNorm(G). p is a sin-cos embedding of a token's index
    in its image. It is equal for F2D and G, so that a 2D token can attend to the geometry token at its own position. It
    is not added to V. One layer with 8 heads.

    Differences from VG-LLM's later versions: no dropout, no MLP after the attention, positions by row-major index
    instead of row and column, RMSNorm, and linear layers without biases. Hence V is exactly 0 for G = 0, and
    Phi(F2D, 0) is the stock VLM for all weights.

    Initialisation: O = 0 and Wq, Wk, Wv normal(0, 0.02), so that the fused model is the stock VLM at first. With a
    random O, nearly uniform attention would shift all tokens of an image by about the same vector. As with LoRA's B,
    only O has a gradient in the first step; Wq, Wk, Wv and the geometry merger have one from the second step.

    Raises:
        ValueError: the width is not divisible by 8.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        if hidden_size % NUM_HEADS:
            raise ValueError(
                f"model.fusion is cross_attention, which needs a width divisible by {NUM_HEADS}, but the "
                f"language model's width is {hidden_size}; choose add, concat or gated."
            )
        self.norm_visual = nn.RMSNorm(hidden_size, eps=1e-6)
        self.norm_geometry = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        positions = position_embeddings(sizes, self.hidden_size, visual.device).to(visual.dtype)
        normed = self.norm_geometry(geometry)
        query, key = self.query(self.norm_visual(visual) + positions), self.key(normed + positions)
        update: torch.Tensor = self.output(attend_within_images(query, key, self.value(normed), sizes))
        return visual + update


def position_embeddings(sizes: Sequence[int], width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sin-cos embeddings of the index of a token in its image, wavelengths from 2 pi to 2e4 pi.

    Args:
        sizes: number of tokens of every image.
        width: embedding width; even, half sines and half cosines.
        device: device of the result.

    Returns:
        ``[sum(sizes), width]`` float32.
    """
    rates = 10000.0 ** -(torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(max(sizes, default=0), device=device)[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([table[:0], *(table[:size] for size in sizes)])


def attend_within_images(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Attention with `NUM_HEADS` heads over ``[tokens, width]``, restricted to tokens of the same image."""
    # Empty slices connect all three inputs to the output even if there is no token. Every weight then gets a gradient,
    # and the ranks of ZeRO reduce the same gradients.
    attended = [query[:0] + key[:0] + value[:0]]
    # Consecutive images of equal size form one batch: without padding and mask, SDPA can use its fast kernels.
    begin = 0
    for size, images in groupby(sizes):
        count = sum(1 for _ in images)  # number of consecutive images of this size
        if size == 0:
            continue
        rows = slice(begin, begin + count * size)
        q, k, v = (x[rows].view(count, size, NUM_HEADS, -1).transpose(1, 2) for x in (query, key, value))
        attended.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count * size, -1))
        begin += count * size
    return torch.cat(attended)


FUSIONS: Registry[type[Fusion]] = Registry("model.fusion")
FUSIONS.update(add=Add, concat=Concat, cross_attention=CrossAttention, gated=Gated)


def make_fusion(name: str, hidden_size: int) -> Fusion:
    """Make a freshly initialised fusion.

    Raises:
        ValueError: no such fusion, or a width that it does not support.
    """
    return FUSIONS.find(name)(hidden_size)
