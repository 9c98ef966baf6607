"""Which modules of the VLM get which kernel: chosen once, when the model is built, and never undone.

A binding is a `forward` of the instance, found before the class's. Classes, modules' names, parameters and hooks stay
as they are, so ZeRO-3, PEFT, checkpointing and what saves weights see the stock model.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear

from w2r2_ds.kernels.lora_linear import bind_lora
from w2r2_ds.kernels.norm import bind_layer, bind_norm
from w2r2_ds.kernels.rope import bind_attention
from w2r2_ds.kernels.select import Kernels
from w2r2_ds.kernels.swiglu import bind_mlp

NORMS = ("Qwen2_5_VLRMSNorm",)
MLPS = ("Qwen2MLP", "Qwen2_5_VLMLP")
SILU = ("SiLU", "SiLUActivation")


def bind_kernels(vlm: Any, kernels: Kernels) -> None:
    """Bind the projections of a LoRA-wrapped Qwen2.5-VL and, with triton, its norms, MLPs, rotations and layers.

    Args:
        vlm: the transformers model, LoRA layers in place.
        kernels: of `resolve_kernels`.
    """
    for module in vlm.modules():
        if isinstance(module, Linear):
            bind_lora(module, kernels)
    if kernels == "torch":
        return
    for module in vlm.modules():
        if type(module).__name__ in NORMS:
            bind_norm(module)
        elif type(module).__name__ in MLPS and type(module.act_fn).__name__ in SILU:
            bind_mlp(module)
    for layer in vlm.model.language_model.layers:
        bind_attention(layer.self_attn)
        bind_layer(layer)
