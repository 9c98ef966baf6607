"""The functions of `w2r2_ds/kernels/` on inputs of a shape's sizes: what they replace, their ways, what they must move.

Bytes are those of the kernels' docstrings, forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from w2r2_ds.bench.shapes import Shape
from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed
from w2r2_ds.kernels.lora_linear import lora_projection
from w2r2_ds.kernels.select import Kernels

DROPOUT = 0.05

Way = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """One function on given inputs.

    Attributes:
        name: of the function, and where it stands.
        function: takes the inputs and which kernels.
        inputs: of the ways; every run gets copies.
        leaves: so many of the first inputs get a gradient.
        moved: bytes to and from memory that no way can save.
        operations: of matrix products.
        replaced: what the project would do without it; None where its torch way is that.
    """

    name: str
    function: Way
    inputs: tuple[Tensor, ...]
    leaves: int
    moved: int
    operations: int = 0
    replaced: Way | None = None

    def ways(self, triton: bool) -> dict[str, Way]:
        """Name -> implementation; the first is the reference of the comparison."""
        kernels: tuple[Kernels, ...] = ("torch", "triton") if triton else ("torch",)
        found = {name: partial(_last, self.function, name) for name in kernels}
        return ({"stock": self.replaced} if self.replaced else {}) | found


def _last(function: Way, kernels: Kernels, *inputs: Tensor) -> Any:
    return function(*inputs, kernels)


def operations(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """All of them: a sample's sizes, as a layer of the language model or the geometry merger has them."""
    draw = Draw(device, dtype)
    tokens, hidden, inner = shape.tokens, shape.hidden, shape.intermediate
    return [
        emit(shape, draw),
        *(
            projection(tokens, hidden, width, shape.lora_rank, p, draw)
            for width in (hidden, inner)
            for p in (0, DROPOUT)
        ),
    ]


class Draw:
    """Random tensors on a device, the same every time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = torch.Generator(device).manual_seed(0), device, dtype

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=self.dtype)


def emit(shape: Shape, draw: Draw) -> Operation:
    """Both streams' inputs, the embeddings asked for a gradient as checkpointing needs it."""
    tokens, visual, hidden = shape.tokens, shape.visual_tokens, shape.hidden
    inputs = draw(1, tokens, hidden), draw(visual, hidden), draw(visual, hidden), torch.arange(visual) + 1
    row = hidden * draw.dtype.itemsize
    moved = (4 * visual + 3 * (tokens - visual) + 2 * visual + 2 * tokens) * row
    slots = inputs[3].to(draw.device)
    return Operation("dual_stream_embed", _streams, (*inputs[:3], slots), 2, moved, replaced=_stock_streams)


def _streams(embeds: Tensor, other: Tensor, visual: Tensor, slots: Tensor, kernels: Kernels) -> Any:
    return dual_stream_embed(embeds, slots, visual, visual + other, kernels)[0]


def _stock_streams(embeds: Tensor, other: Tensor, visual: Tensor, slots: Tensor) -> Tensor:
    """Phi, and what the stock forward does with its visual features, twice."""
    mask = torch.zeros(embeds.shape[1], dtype=torch.bool, device=embeds.device).index_fill_(0, slots, True)
    places = mask[None, :, None].expand_as(embeds)
    fused = embeds.masked_scatter(places, visual + other)
    embeds.detach().masked_scatter(places, visual)
    return fused


def projection(tokens: int, hidden: int, width: int, rank: int, p: float, draw: Draw) -> Operation:
    """A LoRA projection from `hidden` to `width`, with dropout `p`."""
    x, a, b, weight = draw(tokens, hidden), draw(rank, hidden), draw(width, rank), draw(width, hidden)
    row, out, mask = x.nbytes, tokens * width * draw.dtype.itemsize, tokens * hidden if p else 0
    moved = row + 2 * out + 2 * mask + 2 * out + 3 * row + 2 * mask
    own = partial(_projection, p=p, scale=2.0)
    stock = partial(_peft, p=p, scale=2.0)
    name = f"lora_projection to {width}" + (", dropout" if p else "")
    return Operation(name, own, (x, a, b, weight), 3, moved, 4 * tokens * hidden * width, stock)


def _projection(
    x: Tensor, a: Tensor, b: Tensor, weight: Tensor, kernels: Kernels, p: float = 0.0, scale: float = 1.0
) -> Tensor:
    return lora_projection(x, weight, None, a, b, scale, p, kernels)


def _peft(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, p: float, scale: float) -> Tensor:
    """The products and sums that PEFT's LoRA layer makes."""
    return linear(x, weight) + linear(linear(dropout(x, p) if p else x, a), b) * scale
