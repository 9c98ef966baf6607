"""Add LoRA adapters to the language model, and print a table of the trainable parameters."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

# The seven projections of every decoder layer. A list of leaf names would also match the vision tower's MLP.
LORA_TARGETS = r"(?:.*\.)?language_model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_ADAPTER_PART = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b")


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
        ValueError: a value is out of range, or the model has no such projections.
    """
    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}")
    if alpha <= 0:
        raise ValueError(f"lora: alpha must be above 0, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora: dropout must be in [0, 1), got {dropout}")
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
    outside = [name for name in adapted_modules(model) if not re.fullmatch(LORA_TARGETS, name)]
    assert not outside, f"LoRA on {len(outside)} modules outside the language model, first {outside[0]}"
    return model


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules with an adapter, in model order, without PEFT's prefix ``base_model.model.``."""
    names: dict[str, None] = {}
    for name, _ in model.named_parameters():
        part = _ADAPTER_PART.search(name)
        if part:
            names[name[: part.start()].removeprefix("base_model.model.")] = None
    return list(names)


def trainable_table(modules: Mapping[str, nn.Module]) -> str:
    """Text table of the trainable parameters: group, tensors, parameters, trainable parameters, dtypes.

    Args:
        modules: group name -> module. A parameter of two groups (tied embeddings) counts in the first one only.

    Counts are of whole parameters, also if ZeRO-3 has partitioned them (``ds_numel``).
    """
    table = Table(title="Trainable parameters")
    table.add_column("group")
    for heading in ("tensors", "parameters", "trainable"):
        table.add_column(heading, justify="right")
    table.add_column("dtype")
    seen: set[int] = set()
    totals = [0, 0, 0]
    for group, module in modules.items():
        counts, dtypes = _count(module, seen)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        table.add_row(group, *(f"{count:,}" for count in counts), dtypes)
    share = 100.0 * totals[2] / totals[1] if totals[1] else 0.0
    table.add_section()
    table.add_row("all", *(f"{count:,}" for count in totals), f"{share:.3f} % trainable")
    text = io.StringIO()
    Console(file=text, width=110, color_system=None, force_terminal=False).print(table)
    return text.getvalue()


def _count(module: nn.Module, seen: set[int]) -> tuple[list[int], str]:
    """Tensors, parameters and trainable parameters of a module, and its dtypes; adds the counted ones to ``seen``."""
    tensors = parameters = trainable = 0
    dtypes: set[str] = set()
    for parameter in module.parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        tensors += 1
        parameters += size
        trainable += size if parameter.requires_grad else 0
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
    return [tensors, parameters, trainable], ", ".join(sorted(dtypes)) or "-"
