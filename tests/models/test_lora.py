"""LoRA on exactly the seven projections per decoder layer, and the table of trainable parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from w2r2_ds.models.flops import num_lora_parameters
from w2r2_ds.models.lora import add_lora, trainable_table
from w2r2_ds.models.merger import GeometryMerger
from w2r2_ds.models.weights.loading import load_vlm, meta_model

CONFIGS = Path(__file__).parent / "configs"
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules with an adapter."""
    names = (name.removeprefix("base_model.model.") for name, _ in model.named_parameters())
    return [name.partition(".lora_A.")[0] for name in names if ".lora_A." in name]


def test_exactly_seven_modules_per_layer(vlm: Any) -> None:
    model = add_lora(vlm, rank=4, alpha=8, dropout=0.0)
    names = adapted_modules(model)
    assert len(names) == len(set(names)) == 7 * 4
    assert {name.rsplit(".", 1)[1] for name in names} == set(LEAVES)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    for name, value in model.named_parameters():
        assert value.requires_grad == (".lora_A." in name or ".lora_B." in name), name
        assert "visual" not in name or not value.requires_grad


@pytest.mark.parametrize(("name", "layers"), [("qwen2_5_vl_3b", 36), ("qwen2_5_vl_7b", 28)])
def test_real_sizes(name: str, layers: int) -> None:
    model = meta_model(CONFIGS / name)
    with torch.device("meta"):
        adapted = add_lora(model, rank=16, alpha=32)
    assert len(adapted_modules(adapted)) == 7 * layers
    text = json.loads((CONFIGS / name / "config.json").read_text())
    trainable = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    assert num_lora_parameters(text.get("text_config", text), rank=16) == trainable


def test_one_trainable_dtype(tiny_dir: Any) -> None:
    model = add_lora(load_vlm(tiny_dir, torch.bfloat16), rank=2, alpha=4)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.bfloat16}


def test_fresh_adapter_changes_nothing_and_gets_gradients(vlm: Any, tokenizer: Any, visual_inputs: Any) -> None:
    inputs = visual_inputs(vlm.config, tokenizer, "image")
    features = vlm.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    with torch.no_grad():
        before = vlm(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).logits
    model = add_lora(vlm, rank=4, alpha=8)
    after = model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).logits
    assert torch.equal(before, after)
    after.square().sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if "lora_B" in name and grad is not None)


def test_a_model_without_projections_raises(vlm: Any) -> None:
    with pytest.raises(ValueError, match="has no module such as"):
        add_lora(vlm.model.visual, rank=4, alpha=8)


def test_table_counts_every_parameter_of_a_group_once(vlm: Any) -> None:
    merger = GeometryMerger(128, 128, merger_hidden=64)
    total = sum(value.numel() for value in vlm.parameters())
    model = add_lora(vlm, rank=4, alpha=8)
    lora = sum(value.numel() for value in model.parameters() if value.requires_grad)
    extra = sum(value.numel() for value in merger.parameters())
    text = trainable_table({"vlm": model, "fusion": nn.Identity(), "geometry_merger": merger})
    lines = dict(line.strip().split(": ") for line in text.splitlines()[1:])
    assert lines == {
        "vlm": f"{lora:,} of {total + lora:,} ({lora / (total + lora):.3%}), float32",
        "geometry_merger": f"{extra:,} of {extra:,} (100.000%), float32",
    }


def test_table_counts_partitioned_parameters() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    module.weight.ds_numel = 16  # type: ignore[attr-defined]
    assert "sharded: 16 of 16 (100.000%), bfloat16" in trainable_table({"sharded": module})
