"""SwiGLU between the projections of an MLP, through Liger's op.

Roofline, bytes of bfloat16 per row of width F (eager PyTorch in brackets): forward 6 F (10 F): gate and up read, one
product written; backward 10 F (18 F). 5 F FLOP forward: bandwidth alone counts. T 6304 rows, H100 3.35 TB/s: forward
7B (F 18944) 0.214 ms (0.356), 3B (F 11008) 0.124 (0.207); H200 (4.3 TB/s) 0.78 of it. Computed, never measured: no
GPU was there.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from w2r2_ds.kernels.select import Kernels


def swiglu(gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
    """``silu(gate) * up``, of one shape and dtype.

    With triton the backward pass writes both gradients over ``gate`` and ``up``: it can run once.
    """
    if kernels == "torch":
        return silu(gate) * up
    from liger_kernel.ops import LigerSiLUMulFunction

    product: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return product


def bind_mlp(module: Any) -> None:
    """Liger's op for one stock MLP, the instance, whose activation is SiLU."""
    module.forward = MethodType(_forward, module)


def _forward(module: Any, x: Tensor) -> Tensor:
    made: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x), "triton"))
    return made
