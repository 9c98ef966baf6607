"""The readings of Eq. 6: hand values, and where gradients go and do not go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from w2r2_ds.config import ObjectiveConfig
from w2r2_ds.objective.align import log_probs, mean_per_sample
from w2r2_ds.objective.push import PUSH_TERMS, PushInputs, literal, margin, none
from w2r2_ds.objective.w2r2 import read_shortcut, w2r2_loss


@pytest.fixture
def inputs() -> PushInputs:
    """Sample 0: where rows 1 and 2; sample 1: row 4; sample 2 has none; sample 3 is below mu."""
    return PushInputs(
        log_p=torch.tensor([-9.0, -1.0, -2.0, -9.0, -0.1, -3.0, -5.0], dtype=torch.float64, requires_grad=True),
        log_p_short=torch.tensor([-1.0, -1.5, -2.1, -1.0, -4.0, -1.0, -1.0], dtype=torch.float64),
        sample=torch.tensor([0, 0, 0, 1, 1, 2, 3]),
        where=torch.tensor([False, True, True, False, True, False, True]),
        hinge=torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64),
        lam=1.5,
        margin=1.0,
    )


def test_registry_is_what_the_configuration_offers() -> None:
    assert set(PUSH_TERMS) == set(get_args(get_type_hints(ObjectiveConfig)["push"]))


def test_hand_values(inputs: PushInputs) -> None:
    assert literal(inputs).tolist() == pytest.approx([0.15, 0.3, 0.45, 0.0])
    # Sample 0 leads by (0.5 + 0.1) / 2 = 0.3 nats of 1; sample 1 by 3.9; sample 2 has no where rows; 3 is inactive.
    assert margin(inputs).tolist() == pytest.approx([1.5 * 0.7, 0.0, 0.0, 0.0])
    assert none(inputs).tolist() == [0.0] * 4


def test_gradient_of_margin_by_hand(inputs: PushInputs) -> None:
    margin(inputs).sum().backward()
    assert inputs.log_p.grad is not None
    assert inputs.log_p.grad.tolist() == pytest.approx([0, -0.75, -0.75, 0, 0, 0, 0])


def test_margin_gradcheck(inputs: PushInputs) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])

    def value(logits: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
        return margin(replace(inputs, log_p=log_p, margin=0.5))

    assert value(logits).count_nonzero() == 1
    assert torch.autograd.gradcheck(value, logits)


def test_literal_and_none_have_no_gradient_at_all(inputs: PushInputs) -> None:
    assert not literal(inputs).requires_grad and not none(inputs).requires_grad


def test_align_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    log_p = log_probs(logits, torch.tensor([0, 1, 1]))
    assert log_p.tolist() == pytest.approx([-0.693147, -1.313262, -0.126928], abs=1e-6)
    mean = mean_per_sample(-log_p, torch.tensor([0, 0, 2]), 3, torch.tensor([True, True, True]))
    assert mean.tolist() == pytest.approx([(0.693147 + 1.313262) / 2, 0.0, 0.126928], abs=1e-6)
    assert log_probs(logits.bfloat16(), torch.tensor([0, 1, 1])).dtype == torch.float32


def noisy(batch: Any, vocabulary: int, seed: int, sure: float) -> torch.Tensor:
    """Logits that prefer the labels by `sure`."""
    logits = torch.randn(len(batch.answer_rows.label), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(logits)), batch.answer_rows.label] += sure
    return logits.requires_grad_()


def total(batch: Any, tables: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, statistics, and the two gradients; the shortcut's answer is right unless `sure` says otherwise."""
    sure = changes.pop("sure", 30.0)
    fused, short = (noisy(batch, len(tables.digit), seed, s) for seed, s in ((0, 2.0), (1, sure)))
    loss, stats = w2r2_loss(
        fused, read_shortcut(short, batch.answer_rows.label), batch, ObjectiveConfig(**changes), tables
    )
    loss.backward()
    assert fused.grad is not None
    return loss.detach(), stats, fused.grad, short.grad if short.grad is not None else torch.zeros_like(short)


@pytest.fixture
def batch(batch_of: Any, samples: list[Any]) -> Any:
    return batch_of(samples[:2])


@pytest.mark.parametrize("push", list(PUSH_TERMS))
def test_no_gradient_reaches_the_shortcut(batch: Any, tables: Any, push: str) -> None:
    *_, short = total(batch, tables, push=push)
    assert not short.any()


def test_literal_adds_to_the_loss_and_nothing_to_the_gradient(batch: Any, tables: Any) -> None:
    loss, stats, gradient, _ = total(batch, tables, push="literal")
    plain, plain_stats, plain_gradient, _ = total(batch, tables, push="none")
    assert torch.equal(gradient, plain_gradient)
    assert (stats[:, 2] > 0.2).all()
    assert float(loss - plain) == pytest.approx(1.5 * float(stats[:, 2].sum()), rel=1e-5)
    assert torch.equal(plain_stats[:, [1, 2, 4, 5, 6]], stats[:, [1, 2, 4, 5, 6]])


def test_margin_changes_the_gradient_on_where_rows_only(batch: Any, tables: Any) -> None:
    _, _, gradient, _ = total(batch, tables, push="margin")
    _, _, plain, _ = total(batch, tables, push="none")
    changed = (gradient != plain).any(-1)
    assert torch.equal(changed, batch.answer_rows.where)


@pytest.mark.parametrize("changes", [{"lam": 0.0}, {"mu": 0.999}, {"sure": -30.0}])
def test_margin_equals_none(batch: Any, tables: Any, changes: dict[str, Any]) -> None:
    """Without weight, without a sample above mu, and where the shortcut is wrong."""
    sure = {"sure": changes["sure"]} if "sure" in changes else {}
    loss, _, gradient, _ = total(batch, tables, push="margin", **changes)
    plain, _, plain_gradient, _ = total(batch, tables, push="none", **sure)
    assert torch.equal(loss, plain) and torch.equal(gradient, plain_gradient)


def test_a_sample_without_where_rows_contributes_nothing(batch: Any, tables: Any) -> None:
    rows = batch.answer_rows
    bare = replace(batch, rows=replace(rows, where=rows.where & (rows.sample == 0)))
    _, stats, gradient, _ = total(bare, tables, push="margin")
    _, _, plain, _ = total(bare, tables, push="none")
    assert stats[0, 3] > 0 and stats[1, 3] == 0
    assert torch.equal(gradient[rows.sample == 1], plain[rows.sample == 1])
