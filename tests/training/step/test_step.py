"""The step against reference passes on the stock model (tests/helpers/models/reference_passes.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from encoder_inputs import pixel_values
from objectives import objective_config
from reference_passes import hand_loss, shortcut_of
from two_scenes import PARTNERS, two_scenes
from w2r2_ds.config.schema import RunConfig, TrainConfig
from w2r2_ds.models.build import trainable
from w2r2_ds.models.weights.loading import load_vlm
from w2r2_ds.objective.loss import STATS
from w2r2_ds.objective.push_terms import PUSH_TERMS
from w2r2_ds.objective.scorer import Score, Scorer
from w2r2_ds.training.activation_checkpointing import recompute
from w2r2_ds.training.build import check_objective
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.two_pass import without_dropout
from world_answers import POSITIVE, in_world

SIMILAR = [0.2, 0.9, 0.75]
"""Similarities of the shortcut's answers in the fixture `solved`; mu is 0.7."""


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up similarities of the shortcut's answers: those of a random model are 0."""

    def teacher_forced(self: Scorer, predicted: torch.Tensor, batch: Any) -> Score:
        s = torch.tensor(SIMILAR[: len(batch.ids)], dtype=torch.float64)
        return Score(s, torch.ones_like(s, dtype=torch.bool))

    monkeypatch.setattr(Scorer, "teacher_forced", teacher_forced)


def stock_logits(vlm: Any, batch: Any) -> torch.Tensor:
    """Logits of the answer positions, from the stock model's ordinary forward with pixel values."""
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    pixels, grid = names[batch.visuals.kind]
    visuals = {pixels: pixel_values(batch.visuals), grid: batch.visuals.grid_thw}
    if batch.visuals.kind == "video":
        visuals["second_per_grid_ts"] = torch.ones(len(batch.visuals.grid_thw))  # pairs of frames at 2 a second
    logits = vlm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=batch.token_types,
        use_cache=False,
        **visuals,
    ).logits
    return logits[batch.answer_positions.sample, batch.answer_positions.position]


def in_a_large_box(batch: Any) -> Any:
    """Target boxes that contain the expected boxes of a random model (digits around 4.5), so that both overlap."""
    return replace(batch, target_box=torch.tensor([[0.0, 0, 0, 24, 24, 24, 0, 0, 0]] * len(batch.ids)).double())


def gradients(step: W2R2Step, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of trained parameters, keyed by their names; cleared before and after."""
    step.zero_grad()
    loss.backward()
    result = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(step.model).items()}
    step.zero_grad()
    return result


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert equality within 1e-6 of each tensor's norm: float32 sums in another order."""
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (actual[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("push", PUSH_TERMS)
@pytest.mark.parametrize(("visual", "zero"), [("images", "merged"), ("video", "features")])
def test_loss_and_gradients_equal_two_reference_passes(
    make_step: Callable[..., W2R2Step],
    batch_of: Any,
    samples: list[Any],
    tables: Any,
    solved: None,
    push: str,
    visual: str,
    zero: str,
) -> None:
    # No option has its default, so that ignoring any of them would fail.
    mu = 0.001 if push == "unblocked" else 0.65
    step = make_step(push=push, zero_geometry=zero, lambda_det=1.2, mu=mu, margin=30.0, iou_margin=0.3, cosine=-0.2)
    contrast = push == "contrast"
    batch = in_a_large_box(batch_of(two_scenes(samples) if contrast else samples, visual=visual))
    loss, stats = step(batch)
    ours = gradients(step, loss)
    expected = hand_loss(step.model, batch, step.objective, tables, SIMILAR, PARTNERS if contrast else None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(ours, gradients(step, expected))
    pushed = stats[:, STATS.index("push")] != 0
    if push in ("literal", "reweight", "downweight", "margin", "soft_iou", "representation"):
        assert pushed.tolist() == [False, True, True]
    assert stats[:, STATS.index("unpaired")].tolist() == ([0, 1, 0] if contrast else [0, 0, 0])
    if contrast:
        assert pushed.tolist() == [True, False, True]
    assert pushed.any() == (push != "none")


def test_only_lora_and_merger_have_gradients(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    step(batch_of(samples[:2]))[0].backward()
    with_gradient = {name for name, parameter in step.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in step.named_parameters() if "lora_" in name or "geometry_merger" in name}
    assert with_gradient == expected and not any("vggt" in name for name, _ in step.named_parameters())
    assert all(parameter.grad is None for parameter in step.model.geometry.vggt.parameters())


@pytest.mark.parametrize("visual", ["images", "video"])
def test_untrained_shortcut_equals_the_stock_model(
    make_step: Callable[..., W2R2Step], model_config: Any, batch_of: Any, samples: list[Any], visual: str
) -> None:
    """With untrained LoRA and zero merged geometry, bitwise identical to the VLM in its directory."""
    step = make_step(fresh=True)
    batch = batch_of(samples, visual=visual)
    short = shortcut_of(step, batch, step.model.encode_2d(batch.visuals), [])
    with torch.no_grad():
        logits = stock_logits(load_vlm(model_config.vlm, torch.float32, "sdpa"), batch)
    assert not short.label_log_p.requires_grad
    assert torch.equal(short.prediction, logits.argmax(-1))
    log_p = log_softmax(logits, -1)
    expected = log_p.gather(1, batch.answer_positions.label[:, None])[:, 0]
    torch.testing.assert_close(short.label_log_p, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(short.prediction_log_p, log_p.max(-1).values, rtol=1e-6, atol=1e-6)


def test_zeroed_features_still_pass_the_merger(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    step = make_step(zero_geometry="features")
    batch = batch_of(samples[:1])
    features = step.model.encode_3d(batch.visuals)
    merged = step.model.zero_geometry_tokens(features)
    assert merged is not None
    silent = step.model.geometry_merger.mlp(torch.zeros(1, 4 * step.model.geometry.spec.feature_dim))
    torch.testing.assert_close(merged, silent.expand_as(merged))
    visual = step.model.encode_2d(batch.visuals)
    biased = shortcut_of(step, batch, visual, features).label_log_p
    step.model.zero_geometry = "merged"
    assert not torch.allclose(biased, shortcut_of(step, batch, visual, features).label_log_p)


def test_dropout_is_off_in_the_shortcut_only(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    step = make_step(lora_dropout=0.5)
    assert len(step.dropouts) == 2 * 7
    batch = batch_of(samples[:1])
    visual, features = step.model.encode_2d(batch.visuals), step.model.encode_3d(batch.visuals)
    state = torch.get_rng_state()
    first, second = (shortcut_of(step, batch, visual, features).label_log_p for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in step.modules() if isinstance(module, torch.nn.Dropout))
    assert step(batch)[0].item() != step(batch)[0].item()  # the fused pass drops
    step.eval()
    assert torch.equal(first, shortcut_of(step, batch, visual, features).label_log_p)
    assert step(batch)[0].item() == step(batch)[0].item()
    assert not any(module.training for module in step.modules())


def test_dropout_is_restored_after_an_error(make_step: Callable[..., W2R2Step]) -> None:
    step = make_step(lora_dropout=0.5)
    with pytest.raises(RuntimeError), without_dropout(step.dropouts):
        raise RuntimeError
    assert all(module.training for module in step.dropouts)


def test_towers_run_once_and_the_head_gets_answer_positions_only(
    step: W2R2Step, batch_of: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(samples)
    model, calls = step.model, {"visual": 0, "vggt": 0}
    head: list[int] = []
    grads: list[bool] = []

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    model.base.model.visual.register_forward_pre_hook(count("visual"))
    model.geometry.vggt.aggregator.register_forward_pre_hook(count("vggt"))
    model.base.lm_head.register_forward_pre_hook(lambda _, inputs: head.append(inputs[0].shape[:-1].numel()))
    model.base.model.language_model.register_forward_pre_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    step(batch)[0].backward()
    assert calls == {"visual": 1, "vggt": len(samples)}  # one call of VGGT per sample
    assert head == [len(batch.answer_positions.label)] * 2
    assert grads == [False, True]  # the shortcut first


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    """Padding, order and split into micro-batches do not change losses or gradients."""
    _, together = step(batch_of(samples))
    alone = torch.cat([step(batch_of([sample]))[1] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    _, turned = step(batch_of(samples[::-1]))
    torch.testing.assert_close(together, turned.flip(0), rtol=1e-5, atol=1e-6)


def test_geometry_changes_the_fused_pass_only(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples[:1])
    visual, features = step.model.encode_2d(batch.visuals), step.model.encode_3d(batch.visuals)
    other = [features[0].flip(0)]
    assert torch.equal(
        shortcut_of(step, batch, visual, features).label_log_p, shortcut_of(step, batch, visual, other).label_log_p
    )
    fused = [
        step.model.answer_hidden_states(batch, step.model.fuse(visual, step.model.merge(f))) for f in (features, other)
    ]
    assert not torch.allclose(*fused)


@pytest.mark.slow
@pytest.mark.parametrize("push", PUSH_TERMS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_does_not_change_losses_and_gradients(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], solved: None, push: str, dropout: float
) -> None:
    """With dropout too: a recomputed fused pass draws the same masks again, the shortcut of `unblocked` none."""
    step = make_step(push=push, mu=0.001 if push == "unblocked" else 0.7, lora_dropout=dropout)
    batch = in_a_large_box(batch_of(two_scenes(samples) if push == "contrast" else samples[:2]))
    torch.manual_seed(0)
    plain = gradients(step, step(batch)[0])
    recompute(step.model.base.model.language_model.layers, 1, False, step.recompute_context_fn)
    step.model.base.enable_input_require_grads()
    torch.manual_seed(0)
    assert_same_gradients(gradients(step, step(batch)[0]), plain)


@pytest.mark.parametrize("push", PUSH_TERMS)
def test_only_unblocked_keeps_the_graph_of_the_shortcut(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], push: str
) -> None:
    step = make_step(push=push)
    batch = batch_of(samples)
    visual, features = step.model.encode_2d(batch.visuals), step.model.encode_3d(batch.visuals)
    kept = vars(shortcut_of(step, batch, visual, features))
    with_graph = {name for name, value in kept.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    assert with_graph == ({"label_log_p", "prediction_log_p", "iou"} if push == "unblocked" else set())


def test_literal_has_the_gradient_of_fine_tuning(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], solved: None
) -> None:
    """Eq. 6 as printed: the loss is larger by lambda * h, all gradients are bitwise identical."""
    batch = batch_of(samples)
    both = {}
    for push in ("literal", "none"):
        step = make_step(push=push)
        loss, stats = step(batch)
        both[push] = float(loss.detach()), gradients(step, loss)
    assert stats[:, STATS.index("det")].tolist() == pytest.approx([0.0, 0.2, 0.05])
    assert both["literal"][0] - both["none"][0] == pytest.approx(1.5 * 0.25, rel=1e-5)
    assert all(torch.equal(gradient, both["none"][1][name]) for name, gradient in both["literal"][1].items())


@pytest.mark.parametrize("push", PUSH_TERMS)
def test_a_sample_with_a_masked_answer_has_no_effect(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any], caption_sample: Any, push: str
) -> None:
    step = make_step(push=push, mu=0.0)
    batch = batch_of([samples[0], caption_sample])
    rows = batch.answer_positions
    kept = rows.sample == 0
    names = ("sample", "sequence", "position", "label", "where")
    masked = replace(
        batch, optional_answer_positions=replace(rows, **{name: getattr(rows, name)[kept] for name in names})
    )
    _, stats = step(masked)
    assert stats.isfinite().all() and stats[1, STATS.index("align")] == 0
    torch.testing.assert_close(stats[0], step(batch_of(samples[:1]))[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("push", PUSH_TERMS)
def test_a_mixed_batch_equals_its_tasks_separately(
    make_step: Callable[..., W2R2Step],
    batch_of: Any,
    samples: list[Any],
    caption_sample: Any,
    answer_sample: Any,
    text_samples: list[Any],
    push: str,
) -> None:
    """Boxes in both formats, captions, short answers, with frames and without, in one batch."""
    step = make_step(push=push, mu=0.0)
    mixed = [samples[0], caption_sample, text_samples[0], answer_sample, in_world(samples[1], POSITIVE)]
    _, together = step(batch_of(mixed))
    alone = torch.cat([step(batch_of([sample]))[1] for sample in mixed])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together[:, STATS.index("geometry_norm")].gt(0).tolist() == [True, True, False, True, True]
    assert not together[1:4, STATS.index("invalid_short")].any()


def test_a_batch_without_frames_has_an_exact_zero_for_the_geometry(
    make_step: Callable[..., W2R2Step], batch_of: Any, text_samples: list[Any]
) -> None:
    """The towers are called too (ZeRO-3 needs them on every rank); the loss is that of the text."""
    step = make_step(push="poe")
    batch = batch_of(text_samples[:1])
    loss, _ = step(batch)
    loss.backward()
    merger = list(step.model.geometry_merger.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in merger)
    states = step.model.base.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    rows = batch.answer_positions
    logits = step.model.base.lm_head(states[rows.sample, rows.position])
    align = torch.nn.functional.cross_entropy(logits, rows.label)
    product = (2 * log_softmax(logits, -1)).log_softmax(-1).gather(1, rows.label[:, None])[rows.where].mean()
    torch.testing.assert_close(loss, align - 1.5 * product, rtol=1e-5, atol=0)


def test_2d_tokens_are_masked_in_the_fused_training_pass_only(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    plain, masked = make_step(push="none"), make_step(push="none", visual_mask_ratio=0.5)
    batch = batch_of(samples)
    torch.manual_seed(0)
    ours, theirs = masked(batch)[1], plain(batch)[1]
    same = [STATS.index(name) for name in ("s_short", "det", "geometry_norm", "invalid_short")]
    assert torch.equal(ours[:, same], theirs[:, same])
    # The tokens of a random tower have little effect: some losses stay bitwise identical.
    assert (ours[:, STATS.index("align")] != theirs[:, STATS.index("align")]).any()
    torch.manual_seed(1)
    assert torch.equal(masked(batch)[1], ours)  # independent of the random state of the rank
    assert not torch.equal(masked(batch, optimizer_step=1)[1], ours)
    masked.eval(), plain.eval()
    assert torch.equal(masked(batch)[1], plain(batch)[1])


def test_contrast_with_the_own_geometry_is_the_whole_margin(
    make_step: Callable[..., W2R2Step], batch_of: Any, samples: list[Any]
) -> None:
    """Two scenes with the same frames: both passes are equal, so the hinge is m, and both have the same s."""
    step = make_step(push="contrast", lambda_det=2.0, margin=0.25)
    stats = dict(zip(STATS, step(batch_of([samples[0], replace(samples[0], scene_id="another")]))[1].T, strict=True))
    assert stats["push"].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    assert stats["push_active"].tolist() == [1, 1] and torch.equal(stats["s_short"], stats["s_fused"])


def test_contrast_needs_a_second_scene_in_the_training_set(
    model_config: Any, frontend: Any, samples: list[Any]
) -> None:
    objective, train = objective_config(push="contrast"), TrainConfig(micro_batch=2)
    config = RunConfig(model=model_config, objective=objective, train=train)
    check_objective(config, frontend, two_scenes(samples))
    with pytest.raises(ValueError, match=r"objective\.push_term contrast.*data\.train has 1 room"):
        check_objective(config, frontend, samples)
    check_objective(replace(config, objective=objective_config()), frontend, samples)


def test_geometry_norm_by_hand(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    visual = step.model.encode_2d(batch.visuals)
    merged = step.model.merge(step.model.encode_3d(batch.visuals))
    counts = (batch.token_types > 0).sum(-1).tolist()
    pairs = zip(merged.split(counts), torch.cat(visual.pooler_output).split(counts), strict=True)
    expected = [float(geometry.norm() / tokens.norm()) for geometry, tokens in pairs]
    assert step(batch)[1][:, STATS.index("geometry_norm")].tolist() == pytest.approx(expected, rel=1e-5)
