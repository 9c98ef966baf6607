"""Push terms as pure functions: hand values, finite differences, zeros, no NaN."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from objectives import push_term
from w2r2_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from w2r2_ds.objective.push_inputs import Overlaps, PushInputs, States
from w2r2_ds.objective.push_terms import PUSH_TERMS, check_push_term
from w2r2_ds.objective.reductions import mean_per_sample
from w2r2_ds.utils.plugins import import_plugin

GATED = [name for name, term in PUSH_TERMS.items() if term.gated]
"""Push terms that are 0 for a sample whose shortcut has s <= mu."""
LN2, LN4 = math.log(2), math.log(4)


def log_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.fixture
def inputs() -> PushInputs:
    """Four samples and a vocabulary of three tokens.

    Sample 0 has answer tokens 0 (not where), 1 and 2; sample 1 token 3; sample 2 token 4 (not where); sample 3 token
    5, with h = 0.
    """
    log_p = log_of(
        [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.2, 0.4, 0.4], [0.5, 0.25, 0.25]
    )
    short = log_of(
        [0.2, 0.4, 0.4], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.25, 0.5, 0.25]
    )
    label = torch.tensor([0, 1, 0, 0, 1, 0])
    guess = short.argmax(-1)  # 1 or 2, 0, 0, 1, 1, 1
    sample = torch.tensor([0, 0, 0, 1, 2, 3])
    at = torch.arange(6)
    axis = torch.eye(3, dtype=torch.float64)
    return PushInputs(
        log_p=log_p,
        label=label,
        prediction_short=guess,
        label_log_p_short=short[at, label],
        prediction_log_p_short=short[at, guess],
        sample=sample,
        where=torch.tensor([False, True, True, True, False, True]),
        cross_entropy=mean_per_sample(-log_p[at, label], sample, 4, torch.ones(6, dtype=torch.bool)),
        hinge=torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64),
        lambda_det=1.5,
        mu=0.7,
        log_p_short=short,
        states=States(
            fused=torch.stack([axis[0], 2 * axis[0], axis[1], axis[0] + axis[1], axis[2]]),
            short=torch.stack([axis[0], axis[0] + axis[1], axis[0], 3 * axis[0] + 3 * axis[1], axis[2]]),
            sample=torch.tensor([0, 0, 0, 1, 3]),
            where=torch.tensor([True, True, False, False, True]),
            what=torch.tensor([False, False, True, True, False]),
        ),
        overlaps=Overlaps(
            giou=torch.tensor([0.6, -0.5, 0.9, 0.0], dtype=torch.float64),
            iou_short=torch.tensor([0.8, 0.95, 0.0, 0.9], dtype=torch.float64),
            has_box=torch.tensor([True, True, False, True]),
        ),
        has_other=torch.ones(4, dtype=torch.bool),
    )


HAND = {
    "none": [0.0, 0.0, 0.0, 0.0],
    "literal": [0.15, 0.3, 0.45, 0.0],
    # l: ln 2 in all three rows of sample 0; -ln 0.8; -ln 0.4; ln 2.
    "reweight": [0.15 * LN2, -0.3 * math.log(0.8), -0.45 * math.log(0.4), 0.0],
    "downweight": [-0.15 * LN2, 0.3 * math.log(0.8), 0.45 * math.log(0.4), 0.0],
    # Sample 0 exceeds by (ln 2 + 0) / 2; sample 1 by ln 8 > 1; sample 2 has no where token; 3 is below mu.
    "margin": [1.5 * (1 - LN2 / 2), 0.0, 0.0, 0.0],
    # Sample 0: only row 1 differs, p' = 0.5 and p = 0.25; sample 1: p' = 0.8, p = 0.1; sample 3: p' = 0.5, p = 0.25.
    "pseudo_label": [-0.75 * math.log(0.75), -1.2 * math.log(0.9), 0.0, -0.75 * math.log(0.75)],
    # 0.9 - 0.6; min(1, 1.05) + 0.5; no box; below mu.
    "soft_iou": [1.5 * 0.3, 1.5 * 1.5, 0.0, 0.0],
    # Sample 0: where cosines 1 and 1 / sqrt 2, what cosine 0; sample 1: what cosine 1; 2 has no states; 3 is below mu.
    "representation": [1.5 * (1 + (0.5 + math.sqrt(0.5) - 0.5) / 2), 0.0, 0.0, 0.0],
    # Products at the label, normalised: rows 1 and 5 0.125 of 0.3125, row 2 0.25 of 0.375, row 3 0.08 of 0.17.
    "poe": [-0.75 * (math.log(0.4) + math.log(2 / 3)), -1.5 * math.log(8 / 17), 0.0, -1.5 * math.log(0.4)],
    # As `margin`, but not gated: sample 3 exceeds by ln 2.
    "contrast": [1.5 * (1 - LN2 / 2), 0.0, 0.0, 1.5 * (1 - LN2)],
    "unblocked": [1.5 * 0.1, 1.5 * 0.25, 0.0, 1.5 * 0.2],
}


def differentiable(inputs: PushInputs, leaves: tuple[Tensor, ...]) -> PushInputs:
    """The same inputs as a function of fused logits, states, GIoU, and the shortcut's IoU (for `unblocked`)."""
    logits, states, giou, iou_short = leaves
    assert inputs.states is not None and inputs.overlaps is not None
    log_p = torch.log_softmax(logits, -1)
    at = torch.arange(len(log_p))
    every = torch.ones_like(inputs.where)
    return replace(
        inputs,
        log_p=log_p,
        cross_entropy=mean_per_sample(-log_p[at, inputs.label], inputs.sample, len(inputs.hinge), every),
        states=replace(inputs.states, fused=states),
        overlaps=replace(inputs.overlaps, giou=giou, iou_short=iou_short),
    )


def leaves_of(inputs: PushInputs) -> tuple[Tensor, ...]:
    assert inputs.states is not None and inputs.overlaps is not None
    noise = torch.Generator().manual_seed(0)
    start = (inputs.log_p, inputs.states.fused, inputs.overlaps.giou, inputs.overlaps.iou_short)
    # Away from the kinks of max(0, x) at the hand values.
    return tuple((x + 0.05 * torch.rand(x.shape, dtype=x.dtype, generator=noise)).requires_grad_() for x in start)


def test_every_push_term_has_hand_values_a_docstring_and_a_place_in_the_help() -> None:
    assert set(PUSH_TERMS) == set(HAND)
    words = re.findall(r"\w+", (ObjectiveConfig.__doc__ or "").split("lambda_det:")[0])
    assert all(term.__doc__ and name in words for name, term in PUSH_TERMS.items())


def test_an_unknown_push_term_raises_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^objective\.push_term is 'marign'; it must be one of none, literal, .*poe"):
        push_term("marign")


@pytest.mark.parametrize(
    ("name", "given", "field"),
    [
        ("margin", {"margin": -1.0}, "margin"),
        ("margin", {"iou_margin": 0.1}, "iou_margin"),
        ("representation", {"cosine": 1.5}, "cosine"),
        ("none", {"margin": 1.0}, "margin"),
        ("soft_iou", {"iou_margin": "wide"}, "iou_margin"),
    ],
)
def test_a_wrong_hyper_parameter_raises_with_its_name(name: str, given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"objective\.push_term\.{field}"):
        push_term(name, **given)


PLUGIN = """
import torch
from w2r2_ds.objective.push_terms import PushInputs, PushTerm, register_push_term

@register_push_term("scaled_cross_entropy")
class ScaledCrossEntropy(PushTerm):
    scale: float = 2.0

    def __call__(self, inputs: PushInputs) -> torch.Tensor:
        return self.scale * inputs.cross_entropy
"""


@patch.dict(PUSH_TERMS)
def test_a_push_term_from_one_file(inputs: PushInputs, tmp_path: Path) -> None:
    (tmp_path / "own_term.py").write_text(PLUGIN)
    import_plugin(str(tmp_path / "own_term.py"))
    found = push_term("scaled_cross_entropy", scale=3.0)(inputs)
    torch.testing.assert_close(found, 3 * inputs.cross_entropy)


@pytest.mark.parametrize("name", PUSH_TERMS)
def test_hand_values(inputs: PushInputs, name: str) -> None:
    values = push_term(name)(inputs)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(HAND[name], abs=1e-12)


@pytest.mark.parametrize("name", PUSH_TERMS)
def test_gradient_equals_finite_differences(inputs: PushInputs, name: str) -> None:
    leaves = leaves_of(inputs)

    def total(*leaves: Tensor) -> Tensor:
        # The constant provides a graph for push terms without one.
        return push_term(name)(differentiable(inputs, leaves)) + 0 * leaves[0].sum()

    assert torch.autograd.gradcheck(total, leaves, atol=1e-8, rtol=1e-6)
    has_gradient = any(
        g.abs().sum() > 0 for g in torch.autograd.grad(total(*leaves).sum(), leaves, allow_unused=True) if g is not None
    )
    assert has_gradient == (name not in ("none", "literal"))


@pytest.mark.parametrize("name", PUSH_TERMS)
def test_zero_without_weight(inputs: PushInputs, name: str) -> None:
    leaves = leaves_of(inputs)
    values = push_term(name)(differentiable(replace(inputs, lambda_det=0.0), leaves))
    assert values.tolist() == [0.0] * 4
    gradients = torch.autograd.grad((values + 0 * leaves[0].sum()).sum(), leaves, allow_unused=True)
    assert all(not g.any() for g in gradients if g is not None)


@pytest.mark.parametrize("name", PUSH_TERMS)
def test_gated_terms_are_zero_below_mu(inputs: PushInputs, name: str) -> None:
    leaves = leaves_of(inputs)
    values = push_term(name)(differentiable(replace(inputs, hinge=torch.zeros_like(inputs.hinge)), leaves))
    gradients = torch.autograd.grad((values + 0 * leaves[0].sum()).sum(), leaves, allow_unused=True)
    silent = not values.any() and all(not g.any() for g in gradients if g is not None)
    assert silent == (name in [*GATED, "none"])


@pytest.mark.parametrize("name", PUSH_TERMS)
@pytest.mark.parametrize(
    "case", ["no where", "no rows of a sample", "no states", "iou 0", "iou 1", "sure", "sure and wrong"]
)
def test_no_nan(inputs: PushInputs, name: str, case: str) -> None:
    """Finite values and gradients in float32 with empty sets, equal or disjoint boxes, probabilities 0 or 1."""
    assert inputs.states is not None and inputs.overlaps is not None
    leaves = [leaf.detach().float() for leaf in leaves_of(inputs)]
    inputs = cast(inputs, torch.float32)
    assert inputs.states is not None and inputs.overlaps is not None
    if case == "no where":
        inputs = replace(inputs, where=torch.zeros_like(inputs.where))
    if case == "no rows of a sample":  # every answer token masked
        inputs = replace(inputs, sample=torch.zeros_like(inputs.sample))
    if case == "no states":
        inputs = replace(
            inputs,
            states=replace(
                inputs.states, where=torch.zeros(5, dtype=torch.bool), what=torch.zeros(5, dtype=torch.bool)
            ),
        )
    if case.startswith("iou"):
        leaves[2] = torch.full((4,), float(case[-1]))
        leaves[3] = torch.full((4,), float(case[-1]))
    if case.startswith("sure"):
        token = inputs.label if case == "sure" else inputs.prediction_short
        leaves[0] = torch.full((6, 3), -200.0).scatter(-1, token[:, None], 200.0)
    given = tuple(leaf.requires_grad_() for leaf in leaves)
    values = push_term(name)(differentiable(inputs, given)) + 0 * given[0].sum()
    assert values.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), given, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of nested dataclasses to another dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, PushInputs | States | Overlaps):
        return replace(inputs, **{f.name: cast(getattr(inputs, f.name), dtype) for f in fields(inputs)})
    return inputs


def test_downweight_never_has_a_negative_weight(inputs: PushInputs) -> None:
    """The total weight of a sample is at least 0."""
    heavy = replace(inputs, lambda_det=50.0)
    total = inputs.cross_entropy + push_term("downweight")(heavy)
    assert total.tolist() == pytest.approx([0.0, 0.0, 0.0, LN2])


def test_contrast_is_zero_without_another_scene(inputs: PushInputs) -> None:
    """No value and no gradient for any log-likelihoods; the other samples do not change."""
    leaves = leaves_of(inputs)
    given = differentiable(inputs, leaves)
    masked = replace(given, has_other=torch.tensor([True, True, True, False]))
    values, unmasked = push_term("contrast", margin=30.0)(masked), push_term("contrast", margin=30.0)(given)
    assert unmasked[3] > 0 and values[3] == 0 and torch.equal(values[:3], unmasked[:3])
    (gradient,) = torch.autograd.grad(values.sum(), leaves[:1])
    assert gradient[:4].any() and not gradient[5].any()


def test_contrast_raises_the_label_until_the_margin(inputs: PushInputs) -> None:
    logits = inputs.log_p.clone().requires_grad_()
    push_term("contrast")(replace(inputs, log_p=torch.log_softmax(logits, -1))).sum().backward()
    assert logits.grad is not None
    slopes = logits.grad[torch.arange(6), inputs.label]
    assert (slopes < 0).tolist() == [False, True, True, False, False, True]  # row 3 is beyond the margin


@pytest.mark.parametrize(("micro_batch", "questions"), [(1, 1), (4, 4), (2, 1), (8, 4)])
def test_contrast_needs_two_scenes_in_a_micro_batch(micro_batch: int, questions: int) -> None:
    """The options are compared at the start; other terms support one scene."""
    train, data = TrainConfig(micro_batch=micro_batch), DataConfig(questions_per_scene=questions)
    config = RunConfig(objective=ObjectiveConfig(push_term={"name": "contrast"}), train=train, data=data)
    if micro_batch >= 2 * questions:
        assert check_push_term(config).needs_other_geometry
    else:
        with pytest.raises(ValueError, match=rf"contrast.*train\.micro_batch {micro_batch} .*at least {2 * questions}"):
            check_push_term(config)
    assert not check_push_term(RunConfig(train=train, data=data)).needs_other_geometry


def test_poe_has_no_gradient_where_the_shortcut_is_certain_and_correct(inputs: PushInputs) -> None:
    short = torch.full((6, 3), -200.0, dtype=torch.float64).scatter(-1, inputs.label[:, None], 0.0)
    logits = inputs.log_p.clone().requires_grad_()
    push_term("poe")(replace(inputs, log_p=torch.log_softmax(logits, -1), log_p_short=short)).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-80


def test_pseudo_label_takes_probability_from_the_wrong_guess(inputs: PushInputs) -> None:
    logits = inputs.log_p.clone().requires_grad_()
    push_term("pseudo_label")(replace(inputs, log_p=torch.log_softmax(logits, -1))).sum().backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == [False, True, False, True, False, True]
    for row in touched.nonzero().flatten().tolist():
        assert (logits.grad[row] > 0).nonzero().flatten().tolist() == [int(inputs.prediction_short[row])]
