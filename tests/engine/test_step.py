"""The step against passes written by hand on the stock model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from w2r2_ds.config import ObjectiveConfig
from w2r2_ds.engine.step import W2R2Step
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.fusion import pair_frames
from w2r2_ds.models.vlm import load_vlm
from w2r2_ds.objective import w2r2 as objective

OBJECTIVE = ObjectiveConfig(push="margin", lam=1.5, mu=0.7, margin=1.0)


def make_step(model_config: Any, tables: Any, **changes: Any) -> W2R2Step:
    """A step with LoRA pairs that do something, and a merger that is heard."""
    model = build_model(type(model_config)(**{**vars(model_config), **changes}), torch.device("cpu"), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for parameter in model.geometry_merger.mlp.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return W2R2Step(model, OBJECTIVE, tables).train()


@pytest.fixture
def step(model_config: Any, tables: Any) -> W2R2Step:
    return make_step(model_config, tables)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A random model solves nothing: call every odd sample solved by both passes."""

    def similarity(predicted: torch.Tensor, batch: Any, tables: Any) -> torch.Tensor:
        return torch.tensor([0.9 if index % 2 else 0.2 for index in range(len(batch.ids))], dtype=torch.float64)

    monkeypatch.setattr(objective, "grounding_similarity", similarity)
    yield


def stock_logits(vlm: Any, batch: Any) -> torch.Tensor:
    """Answer rows of the stock forward called with pixel values, as anybody would."""
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    pixels, grid = names[batch.visuals.kind]
    visuals = {pixels: batch.visuals.pixel_values, grid: batch.visuals.grid_thw}
    if batch.visuals.kind == "video":
        visuals["second_per_grid_ts"] = torch.ones(len(batch.visuals.grid_thw))  # pairs of frames at 2 a second
    logits = vlm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=batch.token_types,
        use_cache=False,
        **visuals,
    ).logits
    return logits[batch.answer_rows.sample, batch.answer_rows.position]


def fused_logits(model: Any, batch: Any) -> torch.Tensor:
    """The fused pass with embeddings put together by hand."""
    base = model.base
    tower = base.model.visual(batch.visuals.pixel_values, grid_thw=batch.visuals.grid_thw).pooler_output
    geometry = [model.geometry.encode(images) for images in batch.visuals.geometry_images]
    if batch.visuals.kind == "video":
        geometry = [pair_frames(features) for features in geometry]
    tokens = tower.detach() + torch.cat([model.geometry_merger(features) for features in geometry])
    embeddings = base.get_input_embeddings()(batch.input_ids)
    embeddings = embeddings.masked_scatter((batch.token_types > 0)[..., None].expand_as(embeddings), tokens)
    states = base.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return base.lm_head(states)[batch.answer_rows.sample, batch.answer_rows.position]


def hand_loss(fused: torch.Tensor, short: torch.Tensor, batch: Any) -> torch.Tensor:
    """Sum over samples of cross-entropy, plus the margin on every odd sample."""
    rows = batch.answer_rows
    loss = torch.zeros(())
    for index in range(len(batch.ids)):
        mine = rows.sample == index
        loss = loss + cross_entropy(fused[mine], rows.label[mine])
        if index % 2:
            where = mine & rows.where
            fused_p, short_p = (log_softmax(x[where], -1).gather(1, rows.label[where][:, None]) for x in (fused, short))
            loss = loss + 1.5 * torch.relu(1.0 - (fused_p - short_p).mean())
    return loss


@pytest.mark.parametrize("visual", ["images", "video"])
def test_loss_and_gradients_are_those_of_two_plain_passes(
    step: W2R2Step, batch_of: Any, samples: list[Any], solved: None, visual: str
) -> None:
    batch = batch_of(samples, visual=visual)
    loss, stats = step(batch)
    loss.backward()
    assert stats[:, objective.STATS.index("push")].gt(0).tolist() == [False, True, False]
    gradients = {name: parameter.grad for name, parameter in trainable(step.model).items()}
    step.zero_grad()
    with torch.no_grad():
        short = stock_logits(step.model.base, batch)
    expected = hand_loss(fused_logits(step.model, batch), short, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, parameter in trainable(step.model).items():
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None and parameter.grad.norm() > 0, name
        assert (gradient - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name


def test_only_lora_and_merger_have_gradients(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    step(batch_of(samples[:2]))[0].backward()
    with_gradient = {name for name, parameter in step.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in step.named_parameters() if "lora_" in name or "geometry_merger" in name}
    assert with_gradient == expected and not any("vggt" in name for name, _ in step.named_parameters())
    assert all(parameter.grad is None for parameter in step.model.geometry.vggt.parameters())


@pytest.mark.parametrize("visual", ["images", "video"])
def test_shortcut_is_the_stock_model(
    model_config: Any, tables: Any, batch_of: Any, samples: list[Any], visual: str
) -> None:
    """Untrained LoRA and merged geometry zeroed: the VLM as it comes from its directory, bit for bit."""
    model = build_model(model_config, torch.device("cpu"), seed=1)
    step = W2R2Step(model, OBJECTIVE, tables).train()
    batch = batch_of(samples, visual=visual)
    short = step.shortcut(batch, model.encode_2d(batch.visuals), [])
    with torch.no_grad():
        logits = stock_logits(load_vlm(model_config.vlm, torch.float32, "sdpa"), batch)
    assert not short.log_p.requires_grad
    assert torch.equal(short.predicted, logits.argmax(-1))
    expected = log_softmax(logits, -1).gather(1, batch.answer_rows.label[:, None])[:, 0]
    torch.testing.assert_close(short.log_p, expected, rtol=1e-6, atol=1e-6)


def test_zeroed_features_still_pass_the_merger(
    model_config: Any, tables: Any, batch_of: Any, samples: list[Any]
) -> None:
    step = make_step(model_config, tables, zero="features")
    batch = batch_of(samples[:1])
    features = step.model.encode_3d(batch.visuals)
    merged = step.model.merge_nothing(features)
    assert merged is not None
    silent = step.model.geometry_merger.mlp(torch.zeros(1, 4 * step.model.geometry.feature_dim))
    torch.testing.assert_close(merged, silent.expand_as(merged))
    visual = step.model.encode_2d(batch.visuals)
    biased = step.shortcut(batch, visual, features).log_p
    step.model.zero = "merged"
    assert not torch.allclose(biased, step.shortcut(batch, visual, features).log_p)


def test_dropout_is_off_in_the_shortcut_only(model_config: Any, tables: Any, batch_of: Any, samples: list[Any]) -> None:
    step = make_step(model_config, tables, lora_dropout=0.5)
    assert len(step.dropouts) == 2 * 7
    batch = batch_of(samples[:1])
    visual, features = step.model.encode_2d(batch.visuals), step.model.encode_3d(batch.visuals)
    state = torch.get_rng_state()
    first, second = (step.shortcut(batch, visual, features).log_p for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in step.modules() if isinstance(module, torch.nn.Dropout))
    assert step(batch)[0].item() != step(batch)[0].item()  # the fused pass drops
    step.eval()
    assert torch.equal(first, step.shortcut(batch, visual, features).log_p)
    assert step(batch)[0].item() == step(batch)[0].item()
    assert not any(module.training for module in step.modules())


def test_dropout_comes_back_after_an_error(model_config: Any, tables: Any) -> None:
    step = make_step(model_config, tables, lora_dropout=0.5)
    with pytest.raises(RuntimeError), step.without_dropout():
        raise RuntimeError
    assert all(module.training for module in step.dropouts)


def test_towers_run_once_and_the_head_sees_answers_only(
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
    assert calls == {"visual": 1, "vggt": len(samples)}  # VGGT sees the frames of one sample at a time
    assert head == [len(batch.answer_rows.label)] * 2
    assert grads == [False, True]  # the shortcut first


def test_a_sample_does_not_feel_its_neighbours(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    """Padding, order and split into micro-batches change nothing."""
    _, together = step(batch_of(samples))
    alone = torch.cat([step(batch_of([sample]))[1] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    _, turned = step(batch_of(samples[::-1]))
    torch.testing.assert_close(together, turned.flip(0), rtol=1e-5, atol=1e-6)


def test_geometry_is_heard_by_the_fused_pass_only(step: W2R2Step, batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples[:1])
    visual, features = step.model.encode_2d(batch.visuals), step.model.encode_3d(batch.visuals)
    other = [features[0].flip(0)]
    assert torch.equal(step.shortcut(batch, visual, features).log_p, step.shortcut(batch, visual, other).log_p)
    fused = [step.model.hidden(batch, step.model.fuse(visual, step.model.merge(f))) for f in (features, other)]
    assert not torch.allclose(*fused)


def test_gradient_checkpointing_changes_nothing(
    step: W2R2Step, batch_of: Any, samples: list[Any], solved: None
) -> None:
    batch = batch_of(samples[:2])
    step(batch)[0].backward()
    plain = {name: parameter.grad.clone() for name, parameter in trainable(step.model).items()}
    step.zero_grad()
    step.model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step.model.base.enable_input_require_grads()
    step(batch)[0].backward()
    for name, parameter in trainable(step.model).items():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7)
