"""A small Qwen2.5-VL with every kernel bound, against the stock model: outputs, gradients, KV cache, checkpointing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from w2r2_ds.kernels.bind import bind_kernels
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS, Kernels
from w2r2_ds.models.lora import add_lora
from w2r2_ds.training.activation_checkpointing import recompute

pytestmark = pytest.mark.usefixtures("liger_interpreted")

TOKENS = 6


@pytest.fixture(scope="module")
def stock() -> Any:
    """Two layers, grouped queries, a vision block, and random weights in LoRA's B and the norms."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_hidden_layers": 2, "vocab_size": 32, "rope_parameters": rope, "use_sliding_window": False},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, attn_implementation="sdpa")
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    add_lora(model, rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "norm" in name or "lora_B" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def bound(stock: Any, kernels: Kernels) -> Any:
    """A copy with these kernels."""
    twin = copy.deepcopy(stock)
    bind_kernels(twin.model.language_model, kernels)
    return twin


def results(model: Any, checkpointing: bool) -> list[torch.Tensor]:
    """Last hidden states of two sequences with different positions on every axis, and all gradients."""
    text = model.model.language_model
    text.train(checkpointing)
    if checkpointing:
        recompute(text.layers, 1, False, lambda: (nullcontext(), nullcontext()))
    inputs = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    positions = torch.arange(3 * 2 * TOKENS).view(3, 2, TOKENS) % 7
    states = text(inputs_embeds=inputs, position_ids=positions, attention_mask=None, use_cache=False).last_hidden_state
    model.zero_grad()
    states.square().sum().backward()
    return [states, inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernels", [TORCH_KERNELS, ALL_KERNELS], ids=["torch", "triton"])
def test_the_bound_model_equals_the_stock_model(stock: Any, kernels: Kernels, checkpointing: bool) -> None:
    """Tolerance 1e-4 of the largest value: float32 with another order of summation in two layers."""
    ours, theirs = results(bound(stock, kernels), checkpointing), results(copy.deepcopy(stock), checkpointing)
    assert len(ours) == 2 + 2 * 7 * 2
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(two.detach().abs().max()))


@torch.no_grad()
def test_cached_generation_and_the_vision_tower(stock: Any) -> None:
    model = bound(stock, ALL_KERNELS)
    ids = torch.tensor([[5, 9, 2, 30]])
    positions = torch.arange(7).expand(3, 1, -1)[..., :4]
    generated = [m.generate(ids, position_ids=positions, max_new_tokens=3, do_sample=False) for m in (model, stock)]
    assert torch.equal(*generated) and generated[0].shape == (1, 7)
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    features = [m.model.visual(pixels, grid).pooler_output for m in (model, stock)]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_all_supported_modules_and_no_others_are_bound(stock: Any) -> None:
    model = bound(stock, ALL_KERNELS)
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "forward" in vars(module)}
    lora = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert names == lora | norms | {"mlp"}
    vision = [module for module in model.model.visual.modules() if "forward" in vars(module)]
    assert not vision  # cached features do not depend on model.kernels
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert not any("forward" in vars(module) for module in stock.modules())
