"""Kernels that `model.kernels: auto` can choose, each with the PyTorch operations that it replaces.

Kernel and reference get the same random inputs, with the model's widths and dtype and the tokens of a sample of 16
frames. To add a kernel, add a `Candidate` to `make_candidates`, and its name to `ALL_KERNELS` (select.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from w2r2_ds.kernels import dropout_matmul, liger
from w2r2_ds.kernels.dual_stream_embed import dual_stream_embed
from w2r2_ds.kernels.lora_linear import lora_projection
from w2r2_ds.kernels.select import Backend

ROWS = 4099
"""Number of tokens of a measurement. Odd, so that the last tile of every kernel is incomplete."""
EPS = 1e-6
"""Epsilon of the RMSNorms."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a run's decoder layers, at which kernels are measured.

    Attributes:
        hidden: width of the language model.
        intermediate: width inside its MLPs.
        rank: LoRA rank.
        dropout: LoRA dropout probability.
        dtype: dtype of weights and activations.
        rows: number of tokens.
    """

    hidden: int
    intermediate: int
    rank: int
    dropout: float
    dtype: torch.dtype
    rows: int = ROWS


@dataclass(frozen=True)
class Candidate:
    """A kernel and its reference.

    Attributes:
        name: kernel name, one of `ALL_KERNELS`.
        kernel: function of the input tensors of a case; returns a tensor or a tuple of tensors.
        reference: the same function in PyTorch.
        cases: functions that each return the inputs of one case; called one at a time, so that only the inputs of one
            case are in memory.
        num_differentiable: number of inputs, from the first on, that receive a gradient.
    """

    name: str
    kernel: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    cases: tuple[Callable[[], tuple[Tensor, ...]], ...]
    num_differentiable: int


def make_candidates(shapes: Shapes, device: torch.device) -> list[Candidate]:
    """The kernels that a run of these shapes can use; the dropout kernel only with LoRA dropout that it supports."""
    draw = Draw(device, shapes.dtype)
    rows, hidden, inner = shapes.rows, shapes.hidden, shapes.intermediate
    # (input, output) width of the attention's projections, and of the MLP's gate, up and down projection.
    sizes = ((hidden, hidden), (hidden, inner), (inner, hidden))
    projections = tuple(partial(projection_inputs, draw, rows, *size, shapes.rank) for size in sizes)
    found = [
        Candidate("lora_projection", partial(apply_lora, p=0.0, kernels="torch"), project_peft, projections, 3),
        Candidate(
            "dual_stream_embed",
            partial(embed, kernels="triton"),
            partial(embed, kernels="torch"),
            (partial(embedding_inputs, draw, rows, hidden),),
            2,
        ),
        Candidate(
            "rms_norm",
            partial(liger.rms_norm, eps=EPS),
            partial(liger.rms_norm_torch, eps=EPS),
            (lambda: (draw(rows, hidden), draw(hidden)),),
            1,
        ),
        Candidate("swiglu", liger.swiglu, liger.swiglu_torch, (lambda: (draw(rows, inner), draw(rows, inner)),), 2),
    ]
    if shapes.dropout and dropout_matmul.fits(shapes.rank, shapes.dtype):
        # Kernel and reference draw the same mask from the same seed.
        kernel, reference = (partial(apply_lora, p=shapes.dropout, kernels=kernels) for kernels in ("triton", "torch"))
        found.append(Candidate("dropout_matmul", kernel, reference, projections, 3))
    return found


class Draw:
    """Draws standard normal tensors on a device; seeded, so that every process draws the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = torch.Generator(device).manual_seed(0), device, dtype

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=self.dtype)


def projection_inputs(draw: Draw, rows: int, width: int, out: int, rank: int) -> tuple[Tensor, ...]:
    """Inputs of a LoRA projection: ``x [rows, width]``, ``A [rank, width]``, ``B [out, rank]``, ``W [out, width]``."""
    # Scaled so that the base product and the low-rank update both have variance 1: an error in either is visible.
    a, weight = draw(rank, width).mul_(width**-0.5), draw(out, width).mul_(width**-0.5)
    return draw(rows, width), a, draw(out, rank).mul_(rank**-0.5), weight


def apply_lora(x: Tensor, a: Tensor, b: Tensor, weight: Tensor, p: float, kernels: Backend) -> Tensor:
    """A LoRA projection with dropout `p`."""
    return lora_projection(x, weight, None, a, b, 1.0, p, kernels)


def project_peft(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """A LoRA projection without dropout, with the operations of PEFT."""
    return linear(x, weight) + linear(linear(x, a), b) * 1.0


def embedding_inputs(draw: Draw, rows: int, hidden: int) -> tuple[Tensor, ...]:
    """Embeddings ``[1, rows, hidden]``, fused and shortcut ``[tokens, hidden]``, positions; 1/16 of rows are text."""
    tokens = rows - rows // 16
    positions = torch.randperm(rows, generator=draw.generator, device=draw.device)[:tokens]
    return draw(1, rows, hidden), draw(tokens, hidden), draw(tokens, hidden), positions


def embed(
    embeddings: Tensor, fused: Tensor, shortcut: Tensor, positions: Tensor, kernels: Backend
) -> tuple[Tensor, Tensor]:
    """`dual_stream_embed` with the arguments in another order: first those that receive a gradient."""
    return dual_stream_embed(embeddings, positions, shortcut, fused, kernels)
