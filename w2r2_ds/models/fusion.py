"""Phi: how the merged geometry joins the visual tokens before the language model sees them, `model.fusion`.

A fusion is one class here and one line in `FUSIONS`. `add` is VG-LLM's; the others are the alternatives that its later
versions offer (there, on its 4B model and ScanRefer Acc@0.25: none 31.9, add 36.4, cross-attention 33.7, concat 27.7).
Each docstring says in what it departs from them, where it begins, and what Phi(F2D, 0) is.

Every submodule is called once per pass, whatever the number of images: ZeRO-3 needs the same calls on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

INIT_STD = 0.02
HEADS = 8


class Fusion(nn.Module, ABC):
    """Phi(F2D, G), with G the output of the geometry merger.

    Args:
        hidden_size: width of the language model.
    """

    zero_is_stock: ClassVar[bool] = True
    """Whether the formula gives F2D itself for G = 0; then Phi(F2D, 0) returns it unseen, bit for bit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, visual: torch.Tensor, geometry: torch.Tensor | None, sizes: Sequence[int]) -> torch.Tensor:
        """Fuse the tokens of a batch.

        Args:
            visual: ``[tokens, hidden]`` tokens of the vision tower after its own merger.
            geometry: ``[tokens, hidden]`` of `GeometryMerger`, in the same order; None is Phi(F2D, 0), merged zeros.
            sizes: tokens of every image (or pair of video frames), in order; zeros are allowed.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``visual``; the formula is evaluated in the weights' dtype.

        Raises:
            ValueError: the two grids do not hold the same tokens.
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
        """The formula, on ``[tokens, hidden]`` of one dtype."""


def check_same_tokens(visual: torch.Size, geometry: torch.Size) -> None:
    """Refuse two grids that do not hold the same tokens."""
    if visual != geometry:
        raise ValueError(
            f"fusion: the vision grid is {tuple(visual)} [tokens, hidden] but the geometry grid is {tuple(geometry)}; "
            "give both encoders frames of the same size and order"
        )


class Add(Fusion):
    """F2D + G, VG-LLM's fusion; no parameters. Phi(F2D, 0) is the stock VLM."""

    def combine(self, visual: torch.Tensor, geometry: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return visual + geometry


class Concat(Fusion):
    """W [LayerNorm(F2D), LayerNorm(G)] + b with one Linear(2H -> H), as VG-LLM's later versions; no residual.

    The LayerNorm takes every token's own mean and length from it and only W leads on, so this is the stock VLM nowhere:
    Phi(F2D, 0) = W [LayerNorm(F2D), beta] + b, with beta the bias of G's LayerNorm. The shortcut of W2R2 is then a
    2D-only model that trains along, not the pretrained one.

    Initialisation: W = [identity, normal(0, 0.02)], b = 0, so that the fused model begins with LayerNorm(F2D), the
    nearest that the formula comes to the stock VLM, plus a random projection of the geometry, as `add` has through its
    merger. A random W, as in VG-LLM, which trains the whole language model, would hide the image from a frozen one.
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

    The gate is that of VG-LLM's later versions and of GeoSR (arXiv 2603.26639, Geometry-Guided Fusion). They mix
    g * LayerNorm(F2D) + (1 - g) * LayerNorm(G), which loses the stock VLM; here the gate opens for geometry and F2D
    passes as it is, so that Phi(F2D, 0) is the stock VLM, whatever the weights.

    Initialisation: W = 0 and b = 0, hence g = 1/2 everywhere: `add` with half the geometry. W and the geometry merger
    both have a gradient from the first step.
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
    """F2D + O softmax(Q K' / sqrt(d)) V within every image: 2D tokens ask, geometry tokens answer; 8 heads, one layer.

    Q = Wq (RMSNorm(F2D) + p), K = Wk (RMSNorm(G) + p), V = Wv RMSNorm(G). p are sin-cos codes of a token's index in its
    image, the same for both sides: `add` is told which geometry token lies under a 2D token, attention would have to
    find it out from the content. They are not added to V.

    Against VG-LLM's later versions: no dropout, no MLP behind it, codes of the row-major index instead of row and
    column, and RMSNorm and linear maps without biases. For G = 0 V is therefore exactly 0, and Phi(F2D, 0) is the stock
    VLM, whatever the weights.

    Initialisation: O = 0 and Wq, Wk, Wv normal(0, 0.02), so that the fused model *is* the stock VLM at first. Random
    attention is nearly uniform and would move all tokens of an image by about the same vector, which says nothing of
    where. As with LoRA's B, the first step's gradient reaches O alone; Wq, Wk, Wv and the geometry merger follow.

    Raises:
        ValueError: 8 heads do not divide the width.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        if hidden_size % HEADS:
            raise ValueError(
                f"model.fusion is cross_attention, whose {HEADS} heads do not divide the language model's width "
                f"{hidden_size}; choose add, concat or gated."
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
        codes = index_codes(sizes, self.hidden_size, visual.device).to(visual.dtype)
        seen = self.norm_geometry(geometry)
        query, key = self.query(self.norm_visual(visual) + codes), self.key(seen + codes)
        answer: torch.Tensor = self.output(attend_within_images(query, key, self.value(seen), sizes))
        return visual + answer


def index_codes(sizes: Sequence[int], width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``[sum(sizes), width]`` float32 sin-cos codes of the index of a token in its image, wave lengths 2 pi to 2e4 pi.

    `width` is even: half sines, half cosines.
    """
    rates = 10000.0 ** -(torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(max(sizes, default=0), device=device)[:, None] * rates
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([codes[:0], *(codes[:size] for size in sizes)])


def attend_within_images(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Attention of `HEADS` heads over ``[tokens, width]`` in which a token sees the tokens of its own image only.

    Neighbours of one size are one batch, so nothing is padded and no mask keeps fast kernels away.
    """
    # The empty rows keep the graph whole where there is no token at all.
    attended = [query[:0] + key[:0] + value[:0]]
    begin = 0
    for size, images in groupby(sizes):
        count = sum(1 for _ in images)
        if size == 0:
            continue
        rows = slice(begin, begin + count * size)
        q, k, v = (x[rows].view(count, size, HEADS, -1).transpose(1, 2) for x in (query, key, value))
        attended.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count * size, -1))
        begin += count * size
    return torch.cat(attended)


FUSIONS: dict[str, type[Fusion]] = {
    "add": Add,
    "concat": Concat,
    "cross_attention": CrossAttention,
    "gated": Gated,
}


def make_fusion(name: str, hidden_size: int) -> Fusion:
    """The fusion `model.fusion` names, freshly initialised.

    Raises:
        ValueError: no such fusion, or a width that it cannot have.
    """
    if name not in FUSIONS:
        raise ValueError(f"model.fusion is {name!r}; it is one of {', '.join(FUSIONS)}.")
    return FUSIONS[name](hidden_size)


def fusion_name(fusion: Fusion) -> str:
    """The name under which `FUSIONS` knows a fusion."""
    return next(name for name, kind in FUSIONS.items() if kind is type(fusion))
