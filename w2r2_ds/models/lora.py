"""LoRA adapters of the language model, and a table of the trainable parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

# The seven projections of every decoder layer. A list of leaf names would also match the vision tower's MLP.
LORA_TARGETS = r"(?:.*\.)?language_model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"


def add_lora(vlm: PreTrainedModel, rank: int, alpha: int, dropout: float = 0.0) -> PeftModel:
    """Freeze ``vlm`` and add LoRA to the seven projections of every decoder layer of its language model.

    Args:
        vlm: result of ``load_vlm``, changed in place.
        rank: LoRA rank, at least 1.
        alpha: LoRA alpha; the update is scaled by ``alpha / rank``.
        dropout: LoRA dropout probability in [0, 1). The shortcut pass must run without dropout (`two_pass.py`).

    Raises:
        ValueError: the model has no such projections.
    """
    if not any(re.fullmatch(LORA_TARGETS, name) for name, _ in vlm.named_modules()):
        raise ValueError(
            f"lora: {type(vlm).__name__} has no module such as language_model.layers.0.self_attn.q_proj; "
            "use the result of load_vlm, without adapters"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=LORA_TARGETS, inference_mode=False
    )
    # By default PEFT would make float32 adapters of bfloat16 weights. All trainable weights must have one dtype.
    model = get_peft_model(vlm, config, autocast_adapter_dtype=False)
    assert isinstance(model, PeftModel), f"peft returned {type(model).__name__}"
    return model


def trainable_table(modules: Mapping[str, nn.Module]) -> str:
    """Table of the numbers of trainable and of all parameters, and their dtypes, one line per group.

    Args:
        modules: group name -> module; groups without parameters are skipped.
    """
    lines = ["trainable parameters:"]
    for group, module in modules.items():
        # ZeRO-3 replaces a partitioned parameter by an empty tensor; `ds_numel` is its whole size.
        sizes = {parameter: int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in module.parameters()}
        if sizes:
            trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
            total = sum(sizes.values())
            dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in sizes}))
            lines.append(f"  {group}: {trainable:,} of {total:,} ({trainable / total:.3%}), {dtypes}")
    return "\n".join(lines)
