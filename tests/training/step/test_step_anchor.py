"""The training step with `objective.shortcut_decode: anchor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anchor_batches import anchored, attention_at, put_attention_on
from host_sync import host_constants, host_reads
from packed_batches import questions
from w2r2_ds.config.schema import ObjectiveConfig, RunConfig
from w2r2_ds.models.build import trainable
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.objective.anchor import anchor_similarity, find_anchors
from w2r2_ds.objective.loss import STATS
from w2r2_ds.objective.scorer import Score, Scorer
from w2r2_ds.training.build import check_objective
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.two_pass import build_pass_order

TOKENS = [5, 9, 30]
"""Anchored visual token of every sample: of tokens 0 to 7, 8 to 19 and 20 to 43."""


@pytest.fixture
def anchored_batch(frontend: Any, data_config: Any) -> Callable[..., Any]:
    return anchored(frontend, data_config)


@pytest.fixture
def anchor_step(make_step: Callable[..., W2R2Step]) -> Callable[..., W2R2Step]:
    """Function `anchor_step(pass_order, **changes)`."""

    def make(pass_order: str = "sequential", **changes: Any) -> W2R2Step:
        step = make_step(shortcut_decode="anchor", **changes)
        step.run_passes = build_pass_order(step.model, pass_order, step.push_term.stop_gradient, zero3=False)
        return step

    return make


def column(stats: Tensor, name: str) -> Tensor:
    return stats[:, STATS.index(name)]


def in_front(batch: Any, tokens: list[int]) -> Tensor:
    """``[batch, 9]`` boxes that overlap with the anchored boxes by different amounts."""
    found = find_anchors(attention_at(batch, tokens), batch)
    boxes = torch.cat([found.center, found.size, torch.zeros(len(tokens), 3)], dim=-1)
    boxes[:, 0] += torch.tensor([0.0, 0.1, 0.3]) * boxes[:, 3]
    return boxes


@pytest.mark.parametrize("pass_order", ["sequential", "lockstep"])
def test_s_is_that_of_the_box_at_the_attended_token(
    anchor_step: Callable[..., W2R2Step], anchored_batch: Callable[..., Any], samples: list[Any], pass_order: str
) -> None:
    """Weights that put all attention of the first layer on a known token, in the shortcut pass only.

    In the fused pass, large geometry covers the component by which the token is found.
    """
    batch = anchored_batch(samples)
    step = anchor_step(pass_order, fresh=True)
    with torch.no_grad():
        step.model.geometry_merger.mlp[2].weight.mul_(1e4)
    target = replace(batch, target_box=in_front(batch, TOKENS))
    put_attention_on(step.model, batch, TOKENS)
    expected, valid = anchor_similarity(attention_at(batch, TOKENS), target)
    assert valid.all() and (expected > 0.2).all() and len(set(expected.tolist())) == 3
    _, stats = step(target)
    torch.testing.assert_close(column(stats, "s_short").double(), expected, rtol=1e-6, atol=0)
    assert not column(stats, "invalid_short").any()
    hinge = (expected - step.objective.mu).clamp(min=0).float()
    torch.testing.assert_close(column(stats, "det"), hinge)


def test_the_anchor_is_that_of_the_shortcut_pass(
    anchor_step: Callable[..., W2R2Step], anchored_batch: Callable[..., Any], samples: list[Any]
) -> None:
    """Other geometry changes the fused pass and its loss, but no attention of the shortcut."""
    batch = anchored_batch(samples)
    batch = replace(batch, target_box=torch.tensor([[0.4, 3, 0.8, 9, 9, 9, 0, 0, 0]] * 3).double())
    for pass_order in ("sequential", "lockstep"):
        step = anchor_step(pass_order)
        _, before = step(batch)
        with torch.no_grad():
            step.model.geometry_merger.mlp[2].weight.mul_(-3)
        _, after = step(batch)
        assert column(before, "s_short").all() and not torch.equal(column(before, "align"), column(after, "align"))
        assert torch.equal(column(before, "s_short"), column(after, "s_short"))


def test_gradients_are_those_of_a_constant_s(
    anchor_step: Callable[..., W2R2Step],
    anchored_batch: Callable[..., Any],
    samples: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No gradient through the attention; both pass orders are bit-equal, also with dropout and packing."""
    packed = [*questions(samples[0], 2), *questions(samples[1], 1)]
    for batch in (anchored_batch(samples), anchored_batch(packed, questions_per_scene=3)):
        batch = replace(batch, target_box=torch.tensor([[0.4, 3, 0.8, 9, 9, 9, 0, 0, 0]] * 3).double())
        found = []
        for pass_order, constant in (("sequential", False), ("lockstep", False), ("sequential", True)):
            step = anchor_step(pass_order, lora_dropout=0.3, mu=0.0, push="reweight")
            if len(batch.input_ids) == 1:
                step.model.family.use_packed_attention(step.model.base)
            if constant:
                s = column(found[0][1], "s_short").double()
                score = Score(s, torch.ones(3, dtype=torch.bool))
                monkeypatch.setattr(Scorer, "anchored", lambda *_, score=score: score)
            torch.manual_seed(0)
            loss, stats = step(batch)
            loss.backward()
            found.append((loss.detach(), stats, {n: p.grad for n, p in trainable(step.model).items()}))
        monkeypatch.undo()
        (loss, stats, gradients), *others = found
        assert column(stats, "s_short").all() and column(stats, "push").all()
        for other_loss, other_stats, other in others:
            assert torch.equal(loss, other_loss) and torch.equal(stats, other_stats)
            assert all(torch.equal(gradient, other[name]) for name, gradient in gradients.items())


def test_no_host_sync(
    anchor_step: Callable[..., W2R2Step], anchored_batch: Callable[..., Any], samples: list[Any]
) -> None:
    batch = anchored_batch(samples)
    for pass_order in ("sequential", "lockstep"):
        step = anchor_step(pass_order)
        assert not host_reads(lambda step=step: step(batch)[0].backward())
        assert not host_constants(lambda step=step: step(batch)[0].backward())


def test_a_batch_without_frames_computes_the_same_projections(
    anchor_step: Callable[..., W2R2Step],
    anchored_batch: Callable[..., Any],
    samples: list[Any],
    text_samples: list[Any],
) -> None:
    """Under ZeRO-3 a rank that skipped them would leave the others waiting."""
    step, counts = anchor_step("lockstep"), []
    for layer in step.model.family.language_model(step.model.base).layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda *_: counts.append(1))
    calls = []
    for chosen in (samples[:1], text_samples):
        counts.clear()
        _, stats = step(anchored_batch(chosen))
        calls.append(len(counts))
    assert calls == [6, 6]  # two layers: recorded, shortcut, fused
    kinds = [sample.kind for sample in text_samples]
    assert kinds == ["answer", "grounding"] and column(stats, "invalid_short").tolist() == [0, 1]


def test_families_without_attention_weights_are_an_error(frontend: Any, model_config: Any, samples: list[Any]) -> None:
    class Bare(Qwen25VL):
        row_attention = VlmFamily.row_attention

    config = RunConfig(model=model_config, objective=ObjectiveConfig(shortcut_decode="anchor"))
    check_objective(config, frontend, samples)
    bare: Any = type("Frontend", (), {"family": Bare(), "tokenizer": frontend.tokenizer})
    with pytest.raises(ValueError, match=r"qwen2_5_vl.*row_attention.*objective\.shortcut_decode"):
        check_objective(config, bare, samples)
