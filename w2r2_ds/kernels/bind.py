"""Bind kernels to modules of the language model, once, when the model is built.

A binding is a `forward` of the module *instance*, which Python finds before the class's. Classes, module names,
parameters and hooks stay as they are, so ZeRO-3, PEFT, activation checkpointing and checkpoints see the stock model.
The vision tower keeps PyTorch's operations: cached features then never depend on `model.kernels`. Liger's rotary
embedding is not used, since the stock attention calls its rotation as a function of its file and not as a module.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from w2r2_ds.kernels.lora_linear import bind_lora
from w2r2_ds.kernels.select import Kernels

SILU = ("SiLU", "SiLUActivation")


def bind_kernels(vlm: nn.Module, kernels: Kernels) -> None:
    """Bind the LoRA projections of a VLM and, with ``"triton"``, Liger's RMSNorm and SwiGLU in its language model.

    Args:
        vlm: the transformers model, LoRA layers in place.
        kernels: of `resolve_kernels`.
    """
    for name, module in vlm.named_modules():
        if isinstance(module, Linear):
            bind_lora(module, kernels)
        elif kernels == "triton" and "language_model" in name.split("."):
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_rms_norm, module)
            elif hasattr(module, "gate_proj") and type(getattr(module, "act_fn", None)).__name__ in SILU:
                module.forward = MethodType(_mlp, module)


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Forward of a stock RMSNorm: division in float32, product with the weight in the input's dtype."""
    from liger_kernel.ops import LigerRMSNormFunction

    # in_place False: Liger would write the gradient of the input over that of the output, which the residual shares.
    normed: Tensor = LigerRMSNormFunction.apply(
        hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False
    )
    return normed


def _mlp(module: Any, x: Tensor) -> Tensor:
    """Forward of a stock gated MLP; the backward pass overwrites both operands, so it can run once per forward."""
    from liger_kernel.ops import LigerSiLUMulFunction

    product: Tensor = module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))
    return product
