"""Rotary positions of queries and keys, through Liger's op.

Multimodal sections need no kernel of their own: since transformers 5 the rotary embedding picks temporal, height and
width frequencies itself, and attention gets cosines and sines ``[sequences, length, head_dim]``.

Roofline, bytes of bfloat16 per token and head of width D (eager PyTorch in brackets): 4 D (28 D): read and written in
place. T 6304, H100 3.35 TB/s: 7B (28 + 4 heads of 128) 0.031 ms (0.22), 3B (16 + 2) 0.017 (0.12), backward the same;
H200 (4.3 TB/s) 0.78 of it. Computed, never measured: no GPU was there.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from w2r2_ds.kernels.select import Kernels

NAME = "apply_rotary_pos_emb"
"""What the stock attention calls, a function of its file."""


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Turn ``[sequences, heads, length, head_dim]`` by ``[sequences, length, head_dim]``, both halves of which agree.

    With triton `q` and `k` may be written over, where they are transposed views of a projection's output.
    """
    if kernels == "torch":
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + _half(q) * sin, k * cos + _half(k) * sin
    from liger_kernel.ops import LigerRopeFunction

    turned_q, turned_k = LigerRopeFunction.apply(q, k, cos, sin)
    return turned_q, turned_k


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def bind_attention(module: Any) -> None:
    """Let one stock attention, the instance, run its own forward with Liger's op for `apply_rotary_pos_emb`.

    The stock code is neither copied nor patched: the instance gets a function of the same code whose globals name our
    rotation.

    Raises:
        ValueError: the stock forward calls no such function.
    """
    stock = type(module).forward
    if NAME not in stock.__code__.co_names:
        raise ValueError(
            f"{type(module).__name__}.forward does not call {NAME}: this version of transformers is not the one that "
            "model.kernels triton was written for; give --model.kernels torch."
        )
    names = {**stock.__globals__, NAME: _rotate}
    own = FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    own.__kwdefaults__ = stock.__kwdefaults__
    module.forward = MethodType(own, module)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin, "triton")
