"""Training steps with `model.kernels` triton and torch: equal losses and gradients in every configuration.

All configurations run this package's kernels. Liger's kernels take most of the interpreter's time and do not depend on
the configuration, so they are tested with one.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from objectives import objective_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.kernels.select import ALL_KERNELS, TORCH_KERNELS, Kernels
from w2r2_ds.models import build
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.fusion import FUSIONS
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.two_pass import build_pass_order
from zero3_cases import fixed_similarity, perturb_trainable

pytestmark = pytest.mark.usefixtures("liger_interpreted")

SIMILARITY = {"three": 0.9, "text answer": 0.95}
"""s of the shortcut's answers, above mu, so that the push term has a gradient."""
TOLERANCE = 1e-5
"""Relative tolerance of the loss and of each gradient's norm: float32 sums in another order; 2e-6 was measured."""
OWN_KERNELS = ALL_KERNELS - {"rms_norm", "swiglu"}
ZERO_GEOMETRY = ("merged", "features")
MASK_RATIOS = (0.0, 0.5)
PASS_ORDERS = ("sequential", "lockstep")


@pytest.fixture
def batches(batch_of: Any, samples: list[Any], text_samples: list[Any]) -> dict[str, Any]:
    """A batch with frames, and one without, which carries a dummy frame."""
    found = {"frames": batch_of([samples[1]]), "dummy": batch_of(text_samples[:1])}
    assert {name: batch.visuals.dummy for name, batch in found.items()} == {"frames": False, "dummy": True}
    return found


@pytest.fixture
def steps(model_config: Any, frontend: Any, tables: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`steps(fusion, zero_geometry, kernels)`: a step in PyTorch and one with these kernels, of the same weights."""

    def make(fusion: str, zero_geometry: str, kernels: Kernels = OWN_KERNELS) -> list[W2R2Step]:
        model = replace(model_config, fusion=fusion, zero_geometry=zero_geometry, lora_dropout=0.3)
        config = RunConfig(model=model, objective=objective_config(margin=30.0))
        found = []
        for chosen in (TORCH_KERNELS, kernels):
            monkeypatch.setattr(build, "select_kernels", lambda *_, chosen=chosen: chosen)
            built = build_model(config.model, torch.device("cpu"), seed=1)
            perturb_trainable(built)
            found.append(W2R2Step(built, config, Scorer(tables, frontend.tokenizer, config.objective)).train())
        return found

    return make


def configure(step: W2R2Step, pass_order: str, ratio: float) -> None:
    """Set `train.pass_order` and `objective.visual_mask_ratio` of a step."""
    step.objective = replace(step.objective, visual_mask_ratio=ratio)
    step.run_passes = build_pass_order(step.model, pass_order, step.push_term.stop_gradient, zero3=False)


def loss_and_gradients(step: W2R2Step, batch: Any) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every trained parameter, with one seed for the dropout."""
    torch.manual_seed(7)
    step.zero_grad()
    with fixed_similarity(SIMILARITY):
        loss, _ = step(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainable(step.model).items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(both: list[W2R2Step], batch: Any, case: str) -> torch.Tensor:
    """Compare loss and gradients of two steps; returns the gradients as one vector."""
    expected, ours = (loss_and_gradients(step, batch) for step in both)
    assert ours.keys() == expected.keys() and len(ours) > 15
    for name, value in expected.items():
        error = float((ours[name] - value).norm())
        assert error <= TOLERANCE * float(value.norm()), f"{case}: {name} {error / float(value.norm()):.1e}"
    return torch.cat([value.flatten() for name, value in expected.items() if name != "loss"])


@pytest.mark.parametrize("zero_geometry", ZERO_GEOMETRY)
@pytest.mark.parametrize(
    "fusion", [pytest.param(name, marks=[] if name == "add" else pytest.mark.nightly) for name in FUSIONS]
)
def test_losses_and_gradients_are_equal(steps: Any, batches: dict[str, Any], fusion: str, zero_geometry: str) -> None:
    both = steps(fusion, zero_geometry)
    gradients: dict[tuple[str, float, str], torch.Tensor] = {}
    for pass_order, ratio, (kind, batch) in itertools.product(PASS_ORDERS, MASK_RATIOS, batches.items()):
        for step in both:
            configure(step, pass_order, ratio)
        gradients[pass_order, ratio, kind] = assert_equal(both, batch, f"{pass_order}, mask {ratio}, {kind}")
    # The comparison is sensitive: masking and frames change the gradients by far more than the tolerance.
    for pass_order in PASS_ORDERS:
        whole, masked, dummy = (
            gradients[pass_order, ratio, kind] for ratio, kind in ((0.0, "frames"), (0.5, "frames"), (0.0, "dummy"))
        )
        for other in (masked, dummy):
            assert (whole - other).norm() > 100 * TOLERANCE * whole.norm()


def test_with_liger_kernels(steps: Any, batches: dict[str, Any]) -> None:
    both = steps("add", "features", ALL_KERNELS)
    for step in both:
        configure(step, "lockstep", 0.0)
    assert_equal(both, batches["frames"], "all kernels")


@pytest.mark.parametrize("pass_order", PASS_ORDERS)
def test_the_order_of_modules_does_not_depend_on_the_batch(
    steps: Any, batches: dict[str, Any], pass_order: str
) -> None:
    """ZeRO-3 needs the same modules in the same order on every rank, for any batch."""
    for step in steps("add", "merged"):
        orders = []
        for ratio, batch in itertools.product(MASK_RATIOS, batches.values()):
            configure(step, pass_order, ratio)
            called: list[str] = []
            hooks = [
                module.register_forward_pre_hook(lambda *_, name=name, called=called: called.append(name))
                for name, module in step.model.named_modules()
            ]
            loss_and_gradients(step, batch)
            for hook in hooks:
                hook.remove()
            orders.append(called)
        assert orders[0].count("fusion") == 2 and all(order == orders[0] for order in orders[1:])
