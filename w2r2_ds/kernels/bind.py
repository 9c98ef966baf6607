"""Bind kernels to modules of the language model, once, when the model is built.

A kernel is bound as the `forward` of a module *instance*, which takes precedence over the method of its class. Classes,
module names, parameters and hooks stay as they are, so that ZeRO-3, PEFT, activation checkpointing and checkpoints work
as with the unchanged model.

Not bound: the vision tower, so that cached features do not depend on `model.kernels`; and Liger's rotary embedding,
because transformers' attention calls its rotation as a function, not as a module.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from w2r2_ds.kernels.liger import rms_norm, swiglu
from w2r2_ds.kernels.lora_linear import bind_lora
from w2r2_ds.kernels.select import Kernels, backend_of

SILU = ("SiLU", "SiLUActivation")
"""Class names of SiLU in PyTorch and in transformers."""


def bind_kernels(language_model: nn.Module, kernels: Kernels) -> None:
    """Bind kernels to the LoRA projections, RMSNorms and gated MLPs of a language model, in place.

    Args:
        language_model: `VlmFamily.language_model` of the VLM, LoRA layers in place.
        kernels: names of the kernels that the model uses. "lora_projection", "rms_norm" and "swiglu" are bound;
            "dropout_matmul" is used inside the LoRA projection, and `W2R2` calls "dual_stream_embed". Modules without
            a kernel keep their forward.
    """
    # `language_model.modules()` also yields LoRA's base and adapter layers, to which no kernel applies.
    for module in language_model.modules():
        if isinstance(module, LoraLinear):
            if "lora_projection" in kernels:
                bind_lora(module, backend_of(kernels, "dropout_matmul"))
        elif _is_rms_norm(module):
            if "rms_norm" in kernels:
                module.forward = MethodType(_rms_norm, module)
        elif _is_swiglu(module) and "swiglu" in kernels:
            module.forward = MethodType(_mlp, module)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm with the formula of Llama and Qwen."""
    # Variants with another formula, such as Gemma's, name their epsilon `eps`.
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_swiglu(module: nn.Module) -> bool:
    """Whether a module is a gated MLP with SiLU."""
    return hasattr(module, "gate_proj") and type(getattr(module, "act_fn", None)).__name__ in SILU


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Forward of transformers' RMSNorm, with Liger's kernel."""
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    """Forward of transformers' gated MLP, with Liger's kernel."""
    product: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return product
