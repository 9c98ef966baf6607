"""Add LoRA adapters to the language model, and list the trainable parameters."""

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

    Adapters have the dtype of the weights that they adapt, so that all trainable weights have one dtype. With dropout,
    two passes in training mode draw different masks: run the shortcut pass without dropout.

    Args:
        vlm: result of ``load_vlm``, changed in place.
        rank: LoRA rank, at least 1.
        alpha: LoRA alpha; the update is scaled by ``alpha / rank``.
        dropout: in [0, 1).

    Raises:
        ValueError: the model has no such projections.
    """
    if not any(re.fullmatch(LORA_TARGETS, name) for name, _ in vlm.named_modules()):
        raise ValueError(
            f"lora: {type(vlm).__name__} has no module such as language_model.layers.0.self_attn.q_proj; "
            "use a model that load_vlm returned, without adapters"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=LORA_TARGETS, inference_mode=False
    )
    model = get_peft_model(vlm, config, autocast_adapter_dtype=False)
    assert isinstance(model, PeftModel), f"peft returned {type(model).__name__}"
    return model


def trainable_table(modules: Mapping[str, nn.Module]) -> str:
    """A line per group of modules: trainable parameters, all parameters, dtypes; groups without parameters are skipped.

    Counts are of whole parameters, also if ZeRO-3 has partitioned them (``ds_numel``).
    """
    lines = ["trainable parameters:"]
    for group, module in modules.items():
        sizes = {parameter: int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in module.parameters()}
        if sizes:
            trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
            total = sum(sizes.values())
            dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in sizes}))
            lines.append(f"  {group}: {trainable:,} of {total:,} ({trainable / total:.3%}), {dtypes}")
    return "\n".join(lines)
