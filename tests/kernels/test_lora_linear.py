"""The LoRA projection that replaces PEFT's forward: equal numbers, and PEFT's forward in cases it does not support."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from w2r2_ds.kernels import dropout_matmul, lora_linear
from w2r2_ds.kernels.candidates import Shapes, make_candidates
from w2r2_ds.kernels.lora_linear import bind_lora
from w2r2_ds.kernels.select import Backend

BF16 = torch.bfloat16
IMPLEMENTATIONS: tuple[Backend, ...] = ("torch", "triton")


class Two(nn.Module):
    """A linear layer with bias and one without; LoRA adapts both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Checkpointed(nn.Module):
    """A model whose activations are recomputed in the backward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.model, x, use_reentrant=False)
        return out


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["first", "second"], **options)
    model: Any = get_peft_model(Two(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def bound_copy(model: Any) -> Any:
    """A copy with bound LoRA projections."""
    twin = copy.deepcopy(model)
    for module in (twin.base_model.model.first, twin.base_model.model.second):
        bind_lora(module, "torch")
    return twin


def results(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, and gradients of the LoRA weights, with one seed for the dropout."""
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    model.zero_grad()
    out.float().square().sum().backward()
    return [out, leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Dropout probability of every call of `lora_projection`."""
    made: list[float] = []
    stock = lora_linear.lora_projection

    def counted(*args: Any) -> torch.Tensor:
        made.append(args[6])
        return stock(*args)

    monkeypatch.setattr(lora_linear, "lora_projection", counted)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_the_projection_equals_peft(calls: list[float], dropout: float, training: bool) -> None:
    """PyTorch draws the same mask. Tolerance 1e-5 of the largest value: float32 with another order of summation."""
    model = adapted(dropout).train(training)
    x = torch.randn(3, 5, 24)
    for ours, theirs in zip(results(bound_copy(model), x), results(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
    assert calls == [dropout if training else 0.0] * 2


def test_bfloat16_is_no_further_from_float32_than_peft() -> None:
    """The update is added before the output is rounded: one rounding less than in PEFT."""
    model = adapted(dtype=torch.bfloat16)
    x = torch.randn(64, 24).bfloat16()
    exact = results(copy.deepcopy(model).float(), x.float())
    ours, theirs = (
        [(got.float() - true).norm() / true.norm() for got, true in zip(results(m, x), exact, strict=True)]
        for m in (bound_copy(model), model)
    )
    assert all(error < 2**-6 for error in ours)  # two projections of three roundings each, 2**-8
    assert sum(ours) < 1.1 * sum(theirs)


def test_checkpointing_draws_the_mask_again(calls: list[float]) -> None:
    model = bound_copy(adapted(0.4))
    whole = results(model, torch.ones(6, 24))
    part = results(Checkpointed(model), torch.ones(6, 24))
    assert len(calls) == 2 + 4
    assert all(torch.equal(one, two) for one, two in zip(whole, part, strict=True))


def test_without_a_graph_no_tensor_is_saved(calls: list[float]) -> None:
    """As in the shortcut pass: under no_grad, with the dropout layers in eval mode."""
    model = bound_copy(adapted(0.4))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.training = False
    kept: list[torch.Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(torch.ones(6, 24))
    assert not kept and not out.requires_grad and calls == [0.0, 0.0]


def test_peft_computes_cases_that_are_not_supported(calls: list[float]) -> None:
    """Adapters that are disabled, merged, two at once, or of another variant; and a base weight that trains."""
    x = torch.randn(6, 24)
    model = bound_copy(adapted())
    plain = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(
            model(x), model.base_model.model.second.base_layer(torch.tanh(model.base_model.model.first.base_layer(x)))
        )
    before = model(x)
    assert len(calls) == 2
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)  # a fresh adapter adds nothing
    model.base_model.set_adapter("default")
    assert len(calls) == 4 and torch.allclose(model(x), before, rtol=1e-4, atol=1e-5) and len(calls) == 6
    bound_copy(adapted(use_dora=True))(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    plain.base_model.model.first.base_layer.weight.requires_grad_()
    plain(x).sum().backward()
    assert plain.base_model.model.first.base_layer.weight.grad is not None
    assert len(calls) == 7  # the second projection of the last


def test_peft_computes_with_weights_that_zero3_has_not_gathered(calls: list[float]) -> None:
    """ZeRO-3's parameters have a `ds_id`; those of a leaf module, gathered together, also `ds_z3_leaf_module`."""
    model = bound_copy(adapted())
    weight = model.base_model.model.first.base_layer.weight
    weight.ds_id = 0
    model(torch.ones(6, 24))
    assert len(calls) == 1
    weight.ds_z3_leaf_module = model
    model(torch.ones(6, 24))
    assert len(calls) == 3


def test_pytorch_computes_ranks_and_dtypes_that_the_kernels_do_not() -> None:
    """In this test, on the CPU without Triton's interpreter, a launch would raise."""
    fitting = [
        [rank for rank in (8, 16, 32, 64, 65, 128) if dropout_matmul.fits(rank, d)] for d in (BF16, torch.float32)
    ]
    assert fitting == [[8, 16, 32, 64], []]
    for rank, dtype in [(64, BF16), (65, BF16), (64, torch.float32)]:
        candidates = make_candidates(Shapes(8, 16, rank, 0.1, dtype, rows=4), torch.device("cpu"))
        assert ("dropout_matmul" in {each.name for each in candidates}) == dropout_matmul.fits(rank, dtype)
    x, keep, a, low = torch.randn(6, 8), torch.rand(6, 8) < 0.5, torch.randn(33, 8), torch.randn(6, 33)
    products = [
        (
            dropout_matmul.down(x, keep, a, 2.0, kernels),
            dropout_matmul.outer(low, x, keep, 2.0, kernels),
            dropout_matmul.up_(x * 1, low, a, keep, 2.0, kernels),
        )
        for kernels in IMPLEMENTATIONS
    ]
    assert all(torch.equal(one, two) for one, two in zip(*products, strict=True))


def test_a_copy_computes_with_its_own_weights() -> None:
    model = bound_copy(adapted())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(torch.ones(1, 24)).any() and model(torch.ones(1, 24)).any()
