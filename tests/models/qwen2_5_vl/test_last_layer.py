"""The last layer for selected tokens against the stock layer for all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from w2r2_ds.models.attention.selected_tokens import SelectedTokens
from w2r2_ds.models.lora import add_lora
from w2r2_ds.models.qwen2_5_vl.last_layer import compute_only
from w2r2_ds.types.batch import Layout

GROUPS = ([0, 0, 0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, -1, -1, -1])
SUFFIXES = ([0, 0, 1, 1, 2, 0, 0, 1, 2, 0], [0, 0, 0, 1, 1, 1, 2, 2, 3, 3], [0] * 10)
"""Two groups with two suffixes each, one with three, one with a single sample; padding at the end."""
SEQUENCE, POSITION = [0, 0, 1, 1, 2, 1], [3, 8, 2, 9, 6, 5]


@pytest.fixture
def layout() -> Layout:
    return Layout(torch.tensor(GROUPS), torch.tensor(SUFFIXES), ())


def visible(layout: Layout) -> Tensor:
    """``[sequences, 1, length, length]``, token by token by the rule of `Layout`; padding attends to itself."""
    sequences, length = layout.group.shape
    result = torch.eye(length, dtype=torch.bool).repeat(sequences, 1, 1, 1)
    for s in range(sequences):
        group, suffix = layout.group[s].tolist(), layout.suffix[s].tolist()
        for i in range(length):
            for j in range(i + 1):
                if group[i] == group[j] >= 0 and suffix[j] in (0, suffix[i]):
                    result[s, 0, i, j] = True
    return result


@pytest.mark.parametrize("full", [False, True])
def test_selected_tokens_equal_those_of_the_stock_layer(vlm: Any, layout: Layout, full: bool) -> None:
    """Values and all gradients, float32, within 2e-6 of each tensor's norm: sums over more zeros, in another order.

    The largest error over 40 seeds is 1.1e-6, in the gradient of the keys' bias: its contributions to all scores of a
    token cancel.
    """
    torch.manual_seed(0)
    add_lora(vlm, rank=4, alpha=8)
    text = vlm.model.language_model
    layer = text.layers[-1].train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(full or "lora_" in name)
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(3, 10, text.config.hidden_size, generator=generator, requires_grad=True)
    tables = text.rotary_emb(hidden, torch.arange(10).expand(3, 3, 10) + 5 * torch.arange(3)[:, None, None])
    sequence, position = torch.tensor(SEQUENCE), torch.tensor(POSITION)
    weights = torch.randn(len(SEQUENCE), text.config.hidden_size, generator=generator)

    def run(own: bool) -> list[Tensor]:
        given = {"position_embeddings": tables, "past_key_values": None, "use_cache": False}
        if own:
            with compute_only(layer, SelectedTokens.of(layout, sequence, position)):
                states = layer(hidden, attention_mask=None, **given)
        else:
            states = layer(hidden, attention_mask=visible(layout), **given)[sequence, position]
        tensors = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
        return [states, *torch.autograd.grad((states * weights).sum(), tensors)]

    ours, theirs = run(True), run(False)
    assert len(ours) > (20 if full else 15) and ours[0].shape == weights.shape
    for actual, expected in zip(ours, theirs, strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() <= 2e-6 * expected.norm()
    assert "forward" not in vars(layer)


def test_queries_and_mlp_are_computed_for_selected_tokens_only(vlm: Any, layout: Layout) -> None:
    layer, counts = vlm.model.language_model.layers[-1], {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = getattr(layer.self_attn, name)
        module.register_forward_pre_hook(lambda _, given, name=name: counts.update({name: len(given[0])}))
    layer.mlp.register_forward_pre_hook(lambda _, given: counts.update(mlp=len(given[0])))
    hidden = torch.randn(3, 10, vlm.config.get_text_config().hidden_size)
    tables = vlm.model.language_model.rotary_emb(hidden, torch.arange(10).expand(3, 3, 10))
    with compute_only(layer, SelectedTokens.of(layout, torch.tensor(SEQUENCE), torch.tensor(POSITION))):
        layer(hidden, position_embeddings=tables)
        with pytest.raises(AssertionError, match="generation"):
            layer(hidden, position_embeddings=tables, past_key_values=object())
    assert counts == {"q_proj": 6, "k_proj": 30, "v_proj": 30, "o_proj": 6, "mlp": 6}


def test_sliding_window_attention(vlm: Any, layout: Layout) -> None:
    layer = vlm.model.language_model.layers[-1]
    layer.self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="use_sliding_window"):
        compute_only(layer, SelectedTokens.of(layout, torch.tensor([0]), torch.tensor([0])))
