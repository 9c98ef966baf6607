"""Both pass orders against the reference passes and each other, and their ZeRO-3 gathers on two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zero3_cases
from host_sync import host_constants, host_reads
from objectives import objective_config, push_term
from reference_passes import hand_loss
from runs import ZERO3, run_ranks
from two_scenes import two_scenes
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.two_pass import LockstepPasses, SequentialPasses, build_pass_order
from zero3_cases import Case, fixed_similarity, perturb_trainable, unfreeze, write_cases

SCHEDULES = ("sequential", "lockstep")
SIMILAR = {"four": 0.2, "three": 0.9, "twelve": 0.75, "text answer": 0.95}
TOLERANCE = 2e-6
"""Relative tolerance of the loss and of each gradient's norm in float32; the largest measured difference is 1.1e-6,
since the last layer sums in another order."""


@pytest.fixture
def make_step(model_config: Any, frontend: Any, tables: Any) -> Callable[..., W2R2Step]:
    """`make_step(pass_order, full, checkpointing, model={...}, **objective)`: a step without zero weights."""

    def make(pass_order: str, full: bool = False, checkpointing: bool = False, **changes: Any) -> W2R2Step:
        config = RunConfig(
            model=replace(model_config, **changes.pop("model", {})),
            objective=objective_config(**changes),
            train=TrainConfig(pass_order=pass_order),  # type: ignore[arg-type]
        )
        model = build_model(config.model, torch.device("cpu"), seed=1)
        perturb_trainable(model)
        if full:
            unfreeze(model)
        step = W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()
        if checkpointing:
            recompute(model.base.model.language_model.layers, 1, False, step.recompute_context_fn)
        return step

    return make


def run(step: W2R2Step, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and gradients of the trained parameters."""
    step.zero_grad()
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainable(step.model).items()}
    return loss.detach(), found


def forwards(step: W2R2Step) -> dict[str, Any]:
    """Overridden forwards of module instances, by model.kernels or temporarily by a pass."""
    return {name: vars(module)["forward"] for name, module in step.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("pass_order", "push", "zero", "visual"),
    [
        ("lockstep", "margin", "merged", "images"),
        ("lockstep", "representation", "features", "video"),
        ("sequential", "margin", "features", "images"),
        ("lockstep", "contrast", "features", "video"),
    ],
)
def test_loss_and_all_gradients_equal_two_reference_passes(
    make_step: Callable[..., W2R2Step],
    batch_of: Any,
    samples: list[Any],
    text_samples: list[Any],
    tables: Any,
    pass_order: str,
    push: str,
    zero: str,
    visual: str,
    full: bool,
    checkpointing: bool,
) -> None:
    step = make_step(pass_order, full, checkpointing, model={"zero_geometry": zero}, push=push, margin=30.0)
    partners = None
    if push == "contrast":
        partners, (first, _, second) = [1, 0], two_scenes(samples)
    else:
        first, second, _ = samples
    batch = batch_of([first, text_samples[0], second], visual=visual)
    before = forwards(step)
    with fixed_similarity(SIMILAR):
        loss, ours = run(step, step(batch)[0])
    assert forwards(step) == before
    expected, theirs = run(
        step, hand_loss(step.model, batch, step.objective, tables, [SIMILAR[name] for name in batch.ids], partners)
    )
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0)
    assert len(ours) > (30 if full else 15)
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pass_orders_are_bit_equal(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], dtype: str, checkpointing: bool
) -> None:
    """Also with dropout, whose masks are drawn in the fused pass only, and in bfloat16."""
    batch, found = batch_of(samples), []
    for pass_order in SCHEDULES:
        step = make_step(pass_order, checkpointing=checkpointing, model={"dtype": dtype, "lora_dropout": 0.5}, mu=0.0)
        torch.manual_seed(0)
        loss, stats = step(batch)
        found.append((stats, *run(step, loss)))
        assert all(module.training for module in step.modules() if module is not step.model.base.model.visual)
    (stats, loss, gradients), (other_stats, other_loss, other) = found
    assert torch.equal(stats, other_stats) and torch.equal(loss, other_loss)
    assert all(torch.equal(gradient, other[name]) for name, gradient in gradients.items())


def test_decoding_does_not_depend_on_the_pass_order(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    """Answers decoded within a lockstep step equal those of a sequential one."""
    batch = batch_of(samples[:2], with_prompts=True)
    stats = [make_step(pass_order, shortcut_decode="greedy")(batch)[1] for pass_order in SCHEDULES]
    assert torch.equal(*stats)


def test_forwards_are_restored_after_an_error(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    step = make_step("lockstep", model={"lora_dropout": 0.5})
    batch = batch_of(samples[:1])
    step.model.base.model.language_model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    before = forwards(step)
    with pytest.raises(ZeroDivisionError):
        step(batch)
    assert forwards(step) == before and all(module.training for module in step.dropouts)


def test_each_layer_advances_the_shortcut_first(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    step = make_step("lockstep")
    text = step.model.base.model.language_model
    calls: list[tuple[str, bool]] = []
    for name, module in (("embed", text.embed_tokens), *((str(i), layer.mlp) for i, layer in enumerate(text.layers))):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append((name, torch.is_grad_enabled())))
    step(batch_of(samples[:1]))
    assert calls == [("embed", True), ("0", False), ("0", True), ("1", False), ("1", True)]


def test_auto_selects_lockstep_under_zero3_only(make_step: Callable[..., W2R2Step]) -> None:
    model = make_step("auto").model
    chosen: dict[Any, type] = {}
    for pass_order in ("auto", *SCHEDULES):
        for push in ("margin", "unblocked"):
            if (pass_order, push) == ("lockstep", "unblocked"):
                continue
            for zero3 in (False, True):
                no_grad = push_term(push).stop_gradient
                chosen[pass_order, push, zero3] = type(build_pass_order(model, pass_order, no_grad, zero3))
    lockstep = {key for key, kind in chosen.items() if kind is LockstepPasses}
    assert lockstep == {("auto", "margin", True), ("lockstep", "margin", False), ("lockstep", "margin", True)}
    assert set(chosen.values()) == {LockstepPasses, SequentialPasses}


def test_lockstep_does_not_support_a_shortcut_with_gradient(make_step: Callable[..., W2R2Step]) -> None:
    """For `unblocked` the configuration is checked too; a registered term is known after its module is imported."""
    with pytest.raises(ValueError, match=r"train\.pass_order is lockstep.*stop_gradient"):
        build_pass_order(make_step("sequential").model, "lockstep", shortcut_no_grad=False, zero3=True)
    with pytest.raises(ValueError, match=r"unblocked needs it; choose train\.pass_order sequential"):
        RunConfig(objective=objective_config(push="unblocked"), train=TrainConfig(pass_order="lockstep"))


def moved(step: W2R2Step, device: torch.device) -> W2R2Step:
    """The step on a device, with all that is not a submodule of it."""
    step.to(device)
    step.model.geometry.vggt.to(device)  # type: ignore[attr-defined]
    step.scorer = replace(step.scorer, tables=step.scorer.tables.to(device))
    return step


@pytest.mark.parametrize(
    ("pass_order", "push"), [*((order, "margin") for order in SCHEDULES), ("lockstep", "contrast")]
)
def test_no_host_sync(
    make_step: Callable[..., W2R2Step],
    batch_of: Any,
    samples: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    pass_order: str,
    push: str,
) -> None:
    """Forward and backward; only the vision tower's loop reads its segments, which `TowerInputs` left on the host.

    Captions and short answers are compared as text: their tokens are read (`Scorer.teacher_forced`).
    """
    step = moved(make_step(pass_order, checkpointing=True, push=push), torch.device("cpu"))
    batch = batch_of(samples)
    tower = batch.visuals.tower
    assert not host_reads(lambda: step(batch)[0].backward())
    assert not host_constants(lambda: step(batch)[0].backward())
    read, lists = set(), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.add(tuple(lists(self))) or lists(self))
    step(batch)[0].backward()
    assert read == {tuple(lists(torch.tensor(begins).diff())) for begins in (tower.frames, tower.windows)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pass_order", SCHEDULES)
def test_no_sync_on_a_gpu(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], pass_order: str
) -> None:
    device = torch.device("cuda")
    step = moved(make_step(pass_order, checkpointing=True), device)
    batch = batch_of(samples).to(device)
    step(batch)[0].backward()  # one-time initialization may synchronize
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


SPLIT = [[["four", "three"]], [["twelve", "three"]]]
ONE_BY_ONE = {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
"""No parameter stays gathered between two uses, so that every use is counted."""
CASES = [
    Case(
        f"{pass_order} {'full' if full else 'LoRA'} {'checkpointing' if checkpointing else 'plain'}",
        SPLIT,
        {"margin": 30.0},
        checkpointing=checkpointing,
        steps=2,
        pass_order=pass_order,
        full=full,
        zero=ONE_BY_ONE,
    )
    for pass_order, full, checkpointing in (
        ("single", False, True),
        ("sequential", False, True),
        ("lockstep", False, False),
        ("lockstep", False, True),
        ("lockstep", True, False),
        ("lockstep", True, True),
    )
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_config: Any, samples: list[Any]) -> list[Any]:
    """Results of every rank; one launch runs all cases."""
    folder = tmp_path_factory.mktemp("schedules")
    ds_config = json.loads(ZERO3.read_text())
    ds_config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    write_cases(folder, CASES, model_config, {sample.id: sample for sample in samples}, ds_config, SIMILAR)
    run_ranks(2, Path(zero3_cases.__file__), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gathers_per_step_of_each_pass_order(ranks: list[Any], case: Case) -> None:
    """Every parameter of every decoder layer, per step: forward and backward, and the shortcut's own if it has one.

    Gradients are those of one whole model, by the sequential pass_order and without checkpointing.
    """
    for found in (rank[case.name] for rank in ranks):
        assert found["gathers"] == [{"single": 2, "lockstep": 2, "sequential": 3}[case.pass_order]]
        assert found["worst"] <= TOLERANCE and found["stats_worst"] <= 1e-5 and found["without_gradient"] == []
