"""The total loss of every push term: independent of the composition of batches, and detached where it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from objectives import objective_config
from w2r2_ds.objective.loss import STATS, PassOutputs, sample_weights, score_shortcut, w2r2_loss
from w2r2_ds.objective.push_terms import PUSH_TERMS, build_push_term
from w2r2_ds.objective.scorer import Scorer
from world_answers import POSITIVE, in_world

HIDDEN = 8
GATED = [name for name, term in PUSH_TERMS.items() if term.gated]


@dataclass
class Total:
    """A loss, its statistics, and gradients of logits and hidden states of both passes."""

    loss: Tensor
    stats: Tensor
    fused: Tensor
    fused_states: Tensor
    short: Tensor
    short_states: Tensor

    def column(self, name: str) -> Tensor:
        return self.stats[:, STATS.index(name)]


@pytest.fixture
def total(batch_of: Any, tables: Any, frontend: Any) -> Callable[..., Total]:
    """`total(samples, sure=30.0, batch=None, **objective)`: loss of random logits that depend on the sample only.

    The fused pass leans towards the label; the shortcut is certain of it (`sure` > 0) or of anything else.
    """

    def noise(sample: Any, salt: int, rows: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * salt + sum(sample.id.encode()))
        return torch.randn(rows, width, generator=generator)

    def make(samples: list[Any], sure: float = 30.0, batch: Any = None, **changes: Any) -> Total:
        batch = batch or batch_of(samples)
        # The shortcut's logits are made up, also those with the geometry of another scene.
        every = torch.ones(len(samples), dtype=torch.bool)
        batch = replace(batch, other_geometry=replace(batch.other_geometry, exists=every))
        rows, what, vocabulary = batch.answer_positions, batch.description_positions, len(tables.digit)
        counts = [int((rows.sample == i).sum()) for i in range(len(samples))]
        inputs = []
        for salt, lean in ((1, 4.0), (2, sure)):
            logits = torch.cat([noise(s, salt, count, vocabulary) for s, count in zip(samples, counts, strict=True)])
            logits[torch.arange(len(logits)), rows.label] += lean
            described = [int((what.sample == i).sum()) for i in range(len(samples))]
            states = [noise(s, salt + 2, count, HIDDEN) for s, count in zip(samples, counts, strict=True)]
            states += [noise(s, salt + 4, count, HIDDEN) for s, count in zip(samples, described, strict=True)]
            inputs += [logits.requires_grad_(), torch.cat(states).requires_grad_()]
        fused, fused_states, short, short_states = inputs
        config = objective_config(**changes)
        scorer = Scorer(tables, frontend.tokenizer, config)
        term = build_push_term(config.push_term)
        shortcut = score_shortcut(PassOutputs(short, short_states if term.needs_states else None), batch, term, scorer)
        outputs = PassOutputs(fused, fused_states if term.needs_states else None)
        loss, stats = w2r2_loss(outputs, shortcut, batch, config, term, scorer)
        loss.backward()
        assert not stats.requires_grad and stats.shape == (len(samples), len(STATS))
        return Total(loss.detach(), stats, *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs))

    return make


@pytest.mark.parametrize("push", PUSH_TERMS)
def test_no_gradient_reaches_the_shortcut(samples: list[Any], total: Callable[..., Total], push: str) -> None:
    result = total(samples[:2], push=push)
    assert result.fused.any()
    assert result.short.any() == (push == "unblocked")
    assert not result.short_states.any()
    assert result.fused_states.any() == (push == "representation")


@pytest.mark.parametrize(
    ("push", "changes"),
    [(push, {"lambda_det": 0.0}) for push in PUSH_TERMS]
    + [(push, changes) for push in GATED for changes in ({"mu": 0.999}, {"sure": -30.0})],
)
def test_push_terms_equal_none_without_weight_or_active_hinge(
    samples: list[Any], total: Callable[..., Total], push: str, changes: dict[str, Any]
) -> None:
    """With lambda 0; and for gated terms, if no sample is above mu or the shortcut is wrong."""
    sure = {"sure": changes["sure"]} if "sure" in changes else {}
    ours, plain = total(samples, push=push, **changes), total(samples, push="none", **sure)
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.fused, plain.fused)
    assert not ours.fused_states.any() and not ours.short.any() and not ours.column("push").any()


@pytest.mark.parametrize("push", GATED)
def test_push_terms_differ_from_none_for_correct_shortcuts(
    samples: list[Any], total: Callable[..., Total], push: str
) -> None:
    ours, plain = total(samples, push=push), total(samples, push="none")
    assert (ours.column("above_mu") == 1).all() and ours.column("push").any() and ours.loss != plain.loss
    changed = not torch.equal(ours.fused, plain.fused) or ours.fused_states.any()
    assert changed == (push != "literal")


def test_literal_adds_lambda_h_and_nothing_to_any_gradient(samples: list[Any], total: Callable[..., Total]) -> None:
    ours, plain = total(samples, push="literal"), total(samples, push="none")
    assert torch.equal(ours.fused, plain.fused) and not ours.short.any()
    assert float(ours.loss - plain.loss) == pytest.approx(1.5 * float(ours.column("det").sum()), rel=1e-5)
    rest = [STATS.index(name) for name in STATS if name not in ("loss", "push", "push_active")]
    assert torch.equal(ours.stats[:, rest], plain.stats[:, rest])


@pytest.mark.parametrize("push", ["margin", "pseudo_label", "poe", "contrast"])
def test_where_terms_have_gradients_at_where_tokens_only(
    samples: list[Any], batch_of: Any, total: Callable[..., Total], push: str
) -> None:
    # The terms need wrong guesses of the shortcut to be non-zero, except `margin`, which needs correct ones.
    sure = 30.0 if push == "margin" else -3.0
    ours, plain = (total(samples, push=name, margin=30.0, sure=sure, mu=0.0) for name in (push, "none"))
    changed = (ours.fused != plain.fused).any(-1)
    where = batch_of(samples).answer_positions.where
    assert not changed[~where].any() and changed[where].any()


@pytest.mark.parametrize("push", PUSH_TERMS)
@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_loss_does_not_depend_on_split_order_and_padding(
    samples: list[Any], total: Callable[..., Total], push: str, reduction: str
) -> None:
    """In one batch, one by one and in reverse order: equal up to the order of float32 sums."""
    changes = {"push": push, "reduction": reduction, "margin": 30.0}
    together = total(samples, **changes)
    alone = [total([sample], **changes) for sample in samples]
    torch.testing.assert_close(together.loss, sum(part.loss for part in alone))
    torch.testing.assert_close(together.stats, torch.cat([part.stats for part in alone]))
    torch.testing.assert_close(together.fused, torch.cat([part.fused for part in alone]))
    turned = total(samples[::-1], **changes)
    torch.testing.assert_close(together.loss, turned.loss)
    torch.testing.assert_close(together.stats, turned.stats.flip(0))


@pytest.mark.parametrize("push", PUSH_TERMS)
def test_push_terms_support_both_box_formats_in_one_batch(
    samples: list[Any], batch_of: Any, total: Callable[..., Total], push: str
) -> None:
    """A world box between two camera boxes: s, the hinge, the term and its gradient, as in a batch of its own."""
    mixed = [samples[0], in_world(samples[1], POSITIVE), samples[2]]
    batch, hard = batch_of(mixed), {"margin": 30.0, "iou_margin": 0.5, "mu": 0.0}
    rows = batch.answer_positions
    sample_of_states = torch.cat([rows.sample, batch.description_positions.sample])
    wrong = {"sure": -3.0} if push in ("pseudo_label", "poe") else {}  # zero for a correct shortcut
    ours, plain = total(mixed, push=push, **hard, **wrong), total(mixed, push="none", **wrong)
    assert wrong or ((ours.column("s_short") > 0.95).all() and (ours.column("above_mu") == 1).all())
    assert not ours.column("invalid_short").any() or wrong
    assert ours.column("push").ne(0).tolist() == [push != "none"] * 3
    for index in range(3):
        mine = rows.sample == index
        changed = not torch.equal(ours.fused[mine], plain.fused[mine])
        assert (changed or ours.fused_states[sample_of_states == index].any()) == (
            push not in ("none", "literal", "unblocked")
        )
        assert ours.short[mine].any() == (push == "unblocked")
        alone = total(mixed[index : index + 1], push=push, **hard, **wrong)
        torch.testing.assert_close(ours.stats[[index]], alone.stats)
        torch.testing.assert_close(ours.fused[mine], alone.fused)


@pytest.mark.parametrize("push", PUSH_TERMS)
@pytest.mark.parametrize("hidden", ["where", "numbers", "what"])
def test_empty_token_sets_give_finite_losses(
    samples: list[Any], batch_of: Any, total: Callable[..., Total], push: str, hidden: str
) -> None:
    """Without *where* tokens, digit tokens or description: finite, and 0 for the terms that need them."""
    batch = batch_of(samples[:2])
    rows = batch.answer_positions
    if hidden == "where":
        batch = replace(batch, optional_answer_positions=replace(rows, where=torch.zeros_like(rows.where)))
    if hidden == "numbers":
        batch = replace(
            batch, optional_answer_positions=replace(rows, digit=torch.full_like(rows.digit, -1), sign=0 * rows.sign)
        )
    if hidden == "what":
        what = batch.description_positions
        none = replace(what, sample=what.sample[:0], position=what.position[:0])
        batch = replace(batch, optional_description_positions=none)
    result = total(samples[:2], batch=batch, push=push, mu=0.0)
    for value in (result.loss, result.stats, result.fused, result.fused_states, result.short):
        assert value.isfinite().all()
    if hidden == "where" and push in ("margin", "pseudo_label", "poe", "contrast"):
        assert not result.column("push").any()
    if hidden == "numbers":  # no answer has a box
        assert not result.column("s_short").any() and result.column("invalid_short").all()
        assert not result.column("push").any() or push in ("pseudo_label", "poe", "contrast")


def test_reductions_by_hand(samples: list[Any], batch_of: Any, total: Callable[..., Total]) -> None:
    """`sample`: all samples have weight 1. `token`: the weight is the number of tokens."""
    by_sample, by_token = total(samples, reduction="sample"), total(samples, reduction="token")
    assert torch.equal(by_sample.stats, by_token.stats)
    batch = batch_of(samples)
    counts = batch.answer_positions.sample.bincount().float()
    assert sample_weights(batch, "sample").tolist() == [1.0] * 3
    assert torch.equal(sample_weights(batch, "token"), counts)
    torch.testing.assert_close(by_sample.loss, by_sample.column("loss").sum())
    torch.testing.assert_close(by_token.loss, (counts * by_token.column("loss")).sum())


def test_token_reduction_is_the_mean_over_tokens(
    samples: list[Any], batch_of: Any, total: Callable[..., Total]
) -> None:
    """As in VG-LLM: each answer token has the same weight in the gradient."""
    result = total(samples, push="none", reduction="token")
    rows = batch_of(samples).answer_positions
    # d(-log p) / d logit of the label is p - 1, for any length of the sample.
    slopes = result.fused[torch.arange(len(rows.label)), rows.label]
    assert ((slopes > -1) & (slopes < 0)).all()
    one = total(samples[:1], push="none", reduction="token")
    torch.testing.assert_close(one.fused, result.fused[: len(one.fused)])


def test_statistics_add_up(samples: list[Any], total: Callable[..., Total]) -> None:
    result = total(samples)
    assert torch.equal(result.column("push_active"), (result.column("push") != 0).float())
    assert result.column("push_active").all() and not total(samples, mu=0.999).column("push_active").any()
    assert not result.column("unpaired").any()
    torch.testing.assert_close(result.column("loss"), result.column("align") + result.column("push"))
    torch.testing.assert_close(result.column("det"), (result.column("s_short") - 0.7).clamp(min=0))
    torch.testing.assert_close(result.column("s_gain"), result.column("s_fused") - result.column("s_short"))
    assert (result.column("s_short") > 0.95).all() and not result.column("invalid_short").any()


def test_invalid_answers_are_counted_and_have_no_similarity(samples: list[Any], total: Callable[..., Total]) -> None:
    """A shortcut that is certain of other tokens than the label predicts no valid box."""
    result = total(samples, sure=-30.0)
    assert ((result.column("s_short") == 0) | (result.column("invalid_short") == 0)).all()
    assert result.column("invalid_short").any()
