"""RMSNorm, alone and with the residual added first, as the language model's layers have them, through Liger's ops.

Roofline, bytes of bfloat16 per row of width H (reads + writes; eager PyTorch in brackets, which goes through float32):
norm forward 4 H (30 H), backward 8 H: reads the gradient and x, fills and writes x's gradient; add and norm forward
8 H (36 H), backward 8 H. About 4 H FLOP: bandwidth alone counts. T 6304 rows, H100 3.35 TB/s: add and norm forward
7B (H 3584) 0.054 ms (0.24), 3B (H 2048) 0.031 (0.14); H200 (4.3 TB/s) 0.78 of it. Computed, never measured: no GPU
was there.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor

from w2r2_ds.kernels.select import Kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """``weight * x / rms(x)`` of ``[..., H]``; the division in float32, the product in the input's dtype."""
    if kernels == "torch":
        wide = x.float()
        return weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: Liger would write x's gradient over the output's, which may be somebody else's too.
    normed: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """``rms_norm(residual + x)`` and the sum itself."""
    if kernels == "torch":
        total = residual + x
        return rms_norm(total, weight, eps, kernels), total
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    normed, total = LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
    return normed, total


def bind_norm(module: Any) -> None:
    """Liger's op for one stock RMSNorm, the instance; given a residual too, it adds it first and returns both."""
    module.forward = MethodType(_forward, module)


def _forward(module: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(hidden_states, module.weight, module.variance_epsilon, "triton")
    return add_rms_norm(hidden_states, residual, module.weight, module.variance_epsilon, "triton")


def bind_layer(layer: Any) -> None:
    """Let one decoder layer, the instance, add the attention's residual within the norm behind it."""
    layer.forward = MethodType(_layer_forward, layer)


def _layer_forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The stock layer over its own submodules; its norms are those of `bind_norm`."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    normed, residual = layer.post_attention_layernorm(attended, hidden_states)
    made: Tensor = residual + layer.mlp(normed)
    return made
