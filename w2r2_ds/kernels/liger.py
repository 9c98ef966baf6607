"""Liger's RMSNorm and SwiGLU as functions of tensors, and the PyTorch operations that they replace."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension; division in float32, product in the dtype of ``x``."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Offset 0 and Llama's casting mode are transformers' formula. in_place False: by default Liger's backward pass
    # writes the gradient of x into the memory of the output's gradient, which the residual connection still needs.
    normed: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    return normed


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` as transformers computes it."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; the backward pass overwrites both operands, so that it can run only once per forward."""
    from liger_kernel.ops import LigerSiLUMulFunction

    product: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return product


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` as transformers computes it."""
    return silu(gate) * up
