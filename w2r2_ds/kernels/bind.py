"""Bind kernels to modules of the language model, once, when the model is built.

A binding is a `forward` of the module *instance*, which takes precedence over the method of its class. Classes, module
names, parameters and hooks stay as they are, so that ZeRO-3, PEFT, activation checkpointing and checkpoints work as
with the stock model. The vision tower keeps PyTorch's operations: cached features then never depend on `model.kernels`.
Liger's rotary embedding is not used: the stock attention calls its rotation as a function, which cannot be bound.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from w2r2_ds.kernels.lora_linear import bind_lora
from w2r2_ds.kernels.select import Kernels

SILU = ("SiLU", "SiLUActivation")


def bind_kernels(language_model: nn.Module, kernels: Kernels) -> None:
    """Bind the LoRA projections of a language model and, with ``"triton"``, Liger's RMSNorm and SwiGLU.

    Args:
        language_model: `VlmFamily.language_model` of the VLM, LoRA layers in place.
        kernels: of `resolve_kernels`.
    """
    for module in language_model.modules():
        if isinstance(module, Linear):
            bind_lora(module, kernels)
        elif kernels == "triton":
            # `variance_epsilon` tells transformers' usual RMSNorm from variants with another formula, such as Gemma's.
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
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
