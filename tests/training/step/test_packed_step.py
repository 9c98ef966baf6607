"""The training step on packed samples against single samples: losses, gradients, decoded answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from host_sync import host_reads
from objectives import objective_config
from packed_batches import packed_of, questions
from two_scenes import two_scenes
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.models.attention.packed import use_packed_attention
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.objective.loss import STATS
from w2r2_ds.objective.scorer import Score, Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.step import W2R2Step

REL = 1e-5
"""Relative tolerance of a loss and of each gradient's norm: float32 sums in another order."""


@pytest.fixture(scope="module")
def pack(frontend: Any, data_config: Any) -> Callable[..., Any]:
    return packed_of(frontend, data_config)


@pytest.fixture
def make_step(model_config: Any, frontend: Any, tables: Any) -> Callable[..., W2R2Step]:
    """`make_step(full, pass_order, checkpointing, **objective)`: step for packed batches, no weight is zero."""

    def make(full: bool = False, pass_order: Any = "auto", checkpointing: bool = False, **changes: Any) -> W2R2Step:
        objective = objective_config(**{"mu": 0.0} | changes)
        config = RunConfig(model=model_config, objective=objective, train=TrainConfig(pass_order=pass_order))
        model = build_model(config.model, torch.device("cpu"), seed=1)
        use_packed_attention(model.base)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                if "lora_B" in name or "geometry_merger.mlp" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if full:
            model.base.model.language_model.requires_grad_(True)
        step = W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()
        if checkpointing:
            recompute(model.base.model.language_model.layers, 1, False, step.recompute_context_fn)
            model.base.enable_input_require_grads()
        return step

    return make


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up similarities of the shortcut's answers, from the samples' ids: those of a random model are 0."""

    def teacher_forced(self: Scorer, predicted: torch.Tensor, batch: Any) -> Score:
        s = torch.tensor([len(identity) / 16 for identity in batch.ids], dtype=torch.float64)
        return Score(s, torch.ones_like(s, dtype=torch.bool))

    monkeypatch.setattr(Scorer, "teacher_forced", teacher_forced)


def in_a_large_box(batch: Any) -> Any:
    """Target boxes that contain the expected boxes of a random model (digits around 4.5), so that both overlap."""
    return replace(batch, target_box=torch.tensor([[0.0, 0, 0, 24, 24, 24, 0, 0, 0]] * len(batch.ids)).double())


Results = tuple[torch.Tensor, dict[str, torch.Tensor]]


def backward(step: W2R2Step, batches: list[Any]) -> Results:
    """Statistics of all samples, and the summed gradients of all batches."""
    step.zero_grad()
    stats = []
    for batch in batches:
        loss, own = step(batch)
        loss.backward()
        stats.append(own)
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(step.model).items()}
    step.zero_grad()
    return torch.cat(stats), gradients


def assert_as_alone(step: W2R2Step, packed: Any, separate: list[Any]) -> None:
    assert_equal(backward(step, [in_a_large_box(packed)]), backward(step, [in_a_large_box(each) for each in separate]))


def assert_equal(packed: Results, separate: Results) -> None:
    torch.testing.assert_close(packed[0], separate[0], rtol=REL, atol=1e-6)
    assert packed[0][:, STATS.index("push")].any()
    for name, gradient in separate[1].items():
        assert gradient.norm() > 0, name
        assert (packed[1][name] - gradient).norm() <= REL * gradient.norm(), name


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_packed_questions_about_one_scene(
    make_step: Callable[..., W2R2Step], pack: Callable[..., Any], batch_of: Any, samples: list[Any], full: bool
) -> None:
    """One, four and eight questions, in both pass orders, the second with checkpointing."""
    steps = [make_step(full, "sequential", push="poe"), make_step(full, "lockstep", checkpointing=True, push="poe")]
    for count in (1, 4, 8):
        chosen = questions(samples[0], count)
        packed = pack(chosen, questions_per_scene=count, packing=True)
        assert len(packed.layout.spans[0]) == 1
        expected = backward(steps[0], [batch_of([sample]) for sample in chosen])
        for step in steps:
            assert_equal(backward(step, [packed]), expected)


@pytest.mark.parametrize(
    ("push", "pass_order", "visual"),
    [
        ("margin", "lockstep", "images"),
        ("representation", "lockstep", "video"),
        ("representation", "sequential", "images"),
        ("unblocked", "sequential", "video"),
    ],
)
def test_packed_scenes_and_tasks(
    make_step: Callable[..., W2R2Step],
    pack: Callable[..., Any],
    batch_of: Any,
    samples: list[Any],
    text_samples: list[Any],
    caption_sample: Any,
    answer_sample: Any,
    solved: None,
    push: str,
    pass_order: str,
    visual: str,
) -> None:
    """Questions about two scenes alternately, a caption, an answer, text only; checkpointed, with *what* states."""
    first, second = questions(samples[0], 3), questions(samples[1], 2)
    chosen = [first[0], second[0], answer_sample, text_samples[1], first[1], caption_sample, second[1], first[2]]
    step = make_step(pass_order=pass_order, checkpointing=True, push=push, mu=0.001, cosine=-0.2, margin=30.0)
    packed = pack(chosen, questions_per_scene=4, visual=visual)
    assert_as_alone(step, packed, [batch_of([sample], visual=visual) for sample in chosen])


@pytest.mark.parametrize("pass_order", ["sequential", "lockstep"])
def test_contrast_of_packed_scenes(
    make_step: Callable[..., W2R2Step],
    pack: Callable[..., Any],
    batch_of: Any,
    samples: list[Any],
    text_samples: list[Any],
    pass_order: str,
) -> None:
    """Questions about two scenes share a pair of frame sets; in padded sequences each has a pair with equal frames."""
    first, third, second = two_scenes(samples)
    chosen = [*questions(first, 2), text_samples[0], *questions(second, 2), third]
    step = make_step(pass_order=pass_order, push="contrast", margin=30.0)
    packed, padded = pack(chosen, questions_per_scene=2), batch_of(chosen)
    assert len(packed.visuals.ids) == 3 and len(padded.visuals.ids) == 5
    results = backward(step, [packed]), backward(make_step(push="contrast", margin=30.0), [padded])
    assert_equal(*results)
    assert results[0][0][:, STATS.index("unpaired")].tolist() == [0, 0, 1, 0, 0, 1]


def test_packing_samples_without_shared_frames(
    make_step: Callable[..., W2R2Step], pack: Callable[..., Any], batch_of: Any, samples: list[Any], caption_sample: Any
) -> None:
    """Packing without shared prefixes, also for two samples with the same frames; masks of 2D tokens are the same."""
    chosen = [*samples, *questions(samples[0], 1), caption_sample]
    step = make_step(push="poe", visual_mask_ratio=0.4)
    packed = pack(chosen, packing=True)
    assert [len(group) for group in packed.layout.spans[0]] == [2] * 5 and len(packed.visuals.ids) == 5
    assert_as_alone(step, packed, [batch_of([sample]) for sample in chosen])


def test_a_packed_batch_without_frames(
    make_step: Callable[..., W2R2Step], pack: Callable[..., Any], batch_of: Any, text_samples: list[Any]
) -> None:
    step = make_step(push="poe")
    packed, separate = pack(text_samples, questions_per_scene=2), [batch_of([sample]) for sample in text_samples]
    (loss, stats), expected = step(packed), torch.cat([step(batch)[1] for batch in separate])
    torch.testing.assert_close(stats, expected, rtol=REL, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in step.model.geometry_merger.parameters())


@pytest.mark.parametrize("visual", ["images", "video"])
def test_decoded_answers_of_packed_samples(
    make_step: Callable[..., W2R2Step],
    pack: Callable[..., Any],
    batch_of: Any,
    samples: list[Any],
    text_samples: list[Any],
    answer_sample: Any,
    visual: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every prompt is decoded with its own frames, through the same attention without spans."""
    short = {"answer": answer_sample.answer, "kind": answer_sample.kind}
    first, other = questions(answer_sample, 2), replace(questions(samples[1], 1)[0], **short)
    chosen = [first[0], text_samples[0], other, first[1]]
    step = make_step(shortcut_decode="greedy", push="poe")
    seen: list[Any] = []
    answers: list[list[list[int]]] = []
    generate = step.generate

    def recorded(*given: Any) -> list[list[int]]:
        seen.append(given)
        answers.append(generate(*given))
        return answers[-1]

    monkeypatch.setattr(step, "generate", recorded)
    with torch.no_grad():
        packed = step(pack(chosen, with_prompts=True, questions_per_scene=4, visual=visual))[1]
        separate = step(batch_of(chosen, with_prompts=True, visual=visual))[1]
    torch.testing.assert_close(packed, separate, rtol=REL, atol=1e-6)
    assert answers[0] == answers[1]
    # A random model may give the same answer for other frames, so its inputs are compared too.
    tokens = [torch.cat(visual.pooler_output) for _, _, visual, _ in seen]
    torch.testing.assert_close(tokens[0], tokens[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0][1].grid_thw, seen[1][1].grid_thw)


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(
    make_step: Callable[..., W2R2Step], pack: Callable[..., Any], samples: list[Any]
) -> None:
    """Another question or answer in the batch does not change it, not even by rounding if lengths are equal."""
    step = make_step(push="poe")
    pair = questions(samples[0], 2)
    other = replace(pair[1], answer=pair[1].answer.replace("0", "7"))
    before, after = (step(pack(chosen, questions_per_scene=2))[1] for chosen in (pair, [pair[0], other]))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_no_host_device_synchronisation(
    make_step: Callable[..., W2R2Step], pack: Callable[..., Any], samples: list[Any]
) -> None:
    step, batch = make_step(pass_order="lockstep", push="poe"), pack(questions(samples[0], 4), questions_per_scene=4)
    assert not host_reads(lambda: step(batch)[0].backward())
