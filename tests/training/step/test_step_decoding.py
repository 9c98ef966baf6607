"""Greedily decoded shortcut answers and their similarity s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reference_passes import shortcut_of
from w2r2_ds.evaluation.generate import generate_tokens
from w2r2_ds.objective.loss import STATS
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import EXTRA_TOKENS, W2R2Step


@pytest.mark.parametrize("visual", ["images", "video"])
def test_s_is_the_similarity_of_the_greedy_answer(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], visual: str
) -> None:
    """The answer equals that of evaluation with zero geometry; training mode is restored, also with checkpointing."""
    step = make_step(shortcut_decode="greedy", lora_dropout=0.5)
    recompute(step.model.base.model.language_model.layers, 1, False, step.recompute_context_fn)
    batch = batch_of(samples, with_prompts=True, visual=visual)
    plain = step.model.encode_2d(batch.visuals)
    texts = step.decode(batch, plain)
    prompts = batch_of(samples, with_answer=False, visual=visual)
    tokenizer = step.scorer.tokenizer
    longest = int(batch.answer_positions.sample.bincount().max()) + EXTRA_TOKENS
    step.eval()
    tokens = generate_tokens(step.model, prompts, tokenizer, "zero", longest, step.video_fps)
    counts = (batch.answer_positions.sample.bincount() + EXTRA_TOKENS).tolist()
    assert texts == [tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(tokens, counts, strict=True)]
    step.train()
    short = shortcut_of(step, batch, plain, step.model.encode_3d(batch.visuals))
    assert torch.equal(short.score.s, step.scorer.decoded(texts, batch).s)
    assert all(module.training for module in step.modules())


def test_a_decoded_answer_does_not_depend_on_the_rest_of_the_batch(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], answer_sample: Any
) -> None:
    """A short answer in a batch with long ones has the same length as in a batch of its own."""
    step = make_step(shortcut_decode="greedy", push="poe")
    mixed = [answer_sample, *samples]
    together = batch_of(mixed, with_prompts=True)
    texts = step.decode(together, step.model.encode_2d(together.visuals))
    for sample, text in zip(mixed, texts, strict=True):
        alone = batch_of([sample], with_prompts=True)
        assert step.decode(alone, step.model.encode_2d(alone.visuals)) == [text]
    assert len(step.scorer.tokenizer(texts[0])["input_ids"]) < len(step.scorer.tokenizer(texts[1])["input_ids"])


def test_s_gain_compares_teacher_forced_answers(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    """Without geometry both passes are the same model: the gain is 0, also with a decoded shortcut answer."""
    step = make_step(shortcut_decode="greedy", fresh=True)
    with torch.no_grad():
        step.model.geometry_merger.mlp[2].weight.zero_()
    _, stats = step(batch_of(samples, with_prompts=True))
    assert not stats[:, STATS.index("s_gain")].any()


def test_a_decoded_label_has_similarity_one(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the label's two decimals; a sentence without a box is counted as invalid."""
    step = make_step(shortcut_decode="greedy")
    batch = batch_of(samples, with_prompts=True)
    answers = [samples[0].answer, "the chair", samples[2].answer]
    monkeypatch.setattr(W2R2Step, "decode", lambda *_: answers)
    _, stats = step(batch)
    column = dict(zip(STATS, stats.T, strict=True))
    assert column["s_short"].tolist() == [pytest.approx(1, abs=0.05), 0, pytest.approx(1, abs=0.05)]
    assert column["invalid_short"].tolist() == [0, 1, 0]
    assert column["above_mu"].tolist() == [1, 0, 1]
