"""Activation checkpointing: equal losses and gradients in every mode, and the memory of each mode."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from objectives import objective_config
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.data.answer_tokens import token_tables
from w2r2_ds.demo.tiny_models import build_tiny_vlm
from w2r2_ds.models.build import build_model, load_frontend, trainable
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.utils.forward_override import override_forward

LAYERS = 6
MODES = {
    "none": None,
    "every layer": (1, False),
    "every second": (2, False),
    "every fourth": (4, False),
    "offloaded": (1, True),
    "every second, offloaded": (2, True),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, samples: list[Any], model_config: Any, batch_of: Any) -> Any:
    """By mode: loss, gradients, bytes on the device after the forward pass, layers that ran twice."""

    folder = tmp_path_factory.mktemp("recompute")
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    sizes = {"hidden": 64, "intermediate": 256, "vision_hidden": 32, "vision_depth": 2}
    build_tiny_vlm(folder / "vlm", texts, 3, layers=LAYERS, **sizes)
    model = replace(model_config, vlm=str(folder / "vlm"), lora_dropout=0.1)
    frontend, batch = load_frontend(model), batch_of(samples)
    config = RunConfig(model=model, objective=objective_config(mu=0.0))
    composed = build_model(model, torch.device("cpu"), 1)
    composed.base.enable_input_require_grads()
    tables = token_tables(frontend.tokenizer, composed.base.config.get_text_config().vocab_size)
    step = W2R2Step(composed, config, Scorer(tables, frontend.tokenizer, config.objective)).train()
    return {name: one_step(step, batch, mode) for name, mode in MODES.items()}, batch.input_ids.numel()


def one_step(step: W2R2Step, batch: Any, mode: tuple[int, bool] | None) -> dict[str, Any]:
    """A step with dropout, whose masks are determined by the seed."""
    layers = step.model.base.model.language_model.layers
    if mode is not None:  # the first mode has no checkpointing
        recompute(layers, *mode, step.recompute_context_fn)
    ran = [0] * LAYERS
    hooks = [  # hooks of a child, which runs inside the layer's checkpoint; the layer's own hooks do not
        layer.self_attn.q_proj.register_forward_hook(lambda *_, at=at: ran.__setitem__(at, ran[at] + 1))
        for at, layer in enumerate(layers)
    ]
    kept = Kept(step)
    step.zero_grad()
    torch.manual_seed(0)
    with kept.hooks():
        loss, _ = step(batch)
    before = list(ran)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in trainable(step.model).items()}
    again = [index for index in range(LAYERS) if ran[index] > before[index]]
    return {"loss": loss.detach(), "gradients": gradients, "kept": kept.bytes, "again": again}


class Kept:
    """Bytes of the storages that an autograd graph keeps, each counted once, without parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.alive: list[torch.Tensor] = []
        self.bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.alive.append(tensor)  # so that no other storage gets the same address
            self.bytes += storage.nbytes()
        return tensor


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_gives_bit_equal_losses_and_gradients(found: Any, mode: str) -> None:
    """Bitwise identical: a recomputed layer draws its dropout masks again."""
    plain, other = found[0]["none"], found[0][mode]
    assert torch.equal(other["loss"], plain["loss"])
    assert all(torch.equal(gradient, plain["gradients"][name]) for name, gradient in other["gradients"].items())
    assert any(gradient.any() for gradient in plain["gradients"].values())


def test_selected_layers_are_recomputed(found: Any) -> None:
    """The last layer never is (models/qwen2_5_vl/last_layer.py)."""
    again = {name: result["again"] for name, result in found[0].items()}
    assert again == {
        "none": [],
        "every layer": [0, 1, 2, 3, 4],
        "every second": [0, 2, 4],
        "every fourth": [0, 4],
        "offloaded": [0, 1, 2, 3, 4],
        "every second, offloaded": [0, 2, 4],
    }


def test_memory_of_saved_activations(found: Any) -> None:
    """Fewer bytes with every recomputed layer; offloading moves the inputs of these layers off the device."""
    kept = {name: result["kept"] for name, result in found[0].items()}
    print(kept)
    order = ["none", "every fourth", "every second", "every layer", "offloaded"]
    assert all(kept[more] > kept[less] for more, less in itertools.pairwise(order))
    assert kept["every layer"] < kept["none"] / 4
    one = found[1] * 64 * 4  # a layer's input in float32
    assert kept["every layer"] - kept["offloaded"] == pytest.approx((LAYERS - 1) * one, rel=1e-3)
    assert kept["every second"] - kept["every second, offloaded"] == pytest.approx(3 * one, rel=1e-3)


def test_forward_overrides_before_and_after_checkpointing() -> None:
    """Overrides of model.kernels are recomputed too; those of a pass are temporary. Without a graph each runs once."""
    calls: list[str] = []
    layers = [torch.nn.Linear(3, 3) for _ in range(3)]
    for index, layer in enumerate(layers):
        stock = layer.forward
        layer.forward = lambda x, *, scale, name=str(index), stock=stock: calls.append(name) or scale * stock(x)  # type: ignore[method-assign]
    for every in (2, 1):  # the second call replaces the first
        recompute(layers, every, False, lambda: (nullcontext(), nullcontext()))

    def through(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x, scale=2.0)
        return x.sum()

    x = torch.ones(2, 3, requires_grad=True)
    loss = through(x)
    loss.backward()
    assert calls == ["0", "1", "2", "1", "0"]
    calls.clear()
    with override_forward(layers[0], lambda inner, x, scale: scale * x):
        loss = through(x)
    loss.backward()
    assert calls == ["1", "2", "1"]
    calls.clear()
    with torch.no_grad():
        through(x)
    assert calls == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recompute_every": 2}, "train.recompute_every"),
        ({"offload_activations": True}, "train.offload_activations"),
    ],
)
def test_options_without_effect_raise(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named} .*train\.activation_checkpointing"):
        RunConfig(train=TrainConfig(activation_checkpointing=False, **changes))


def test_recompute_every_zero_raises() -> None:
    with pytest.raises(ValueError, match="recompute_every"):
        RunConfig(train=TrainConfig(recompute_every=0))
