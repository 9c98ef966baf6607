"""The feature map of a tiny model whose geometry is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from w2r2_ds.data.loader import labeled_loader
from w2r2_ds.diagnostics import feature_map as module
from w2r2_ds.diagnostics.feature_map import FeatureMapOptions, feature_map, tsne, with_different_frames
from w2r2_ds.diagnostics.token_features import collect_tokens
from w2r2_ds.models.build import build_model
from w2r2_ds.models.w2r2 import W2R2, embed_tokens, insert_visual_tokens

OPTIONS = FeatureMapOptions(samples=3, tokens=36, perplexity=5.0, neighbours=4, seed=1, batch_size=2)


@pytest.fixture
def model(model_config: Any) -> W2R2:
    return build_model(model_config, torch.device("cpu"), seed=1).eval()


@torch.no_grad()
def set_geometry(model: W2R2, scale: float, constant: float = 0.0) -> None:
    """Scale the merged geometry, and add a constant vector to it."""
    last: Any = model.geometry_merger.mlp[2]
    last.weight.mul_(scale)
    last.bias.copy_(constant * torch.linspace(-1, 1, len(last.bias)))


def test_tokens_are_the_same_at_all_places(
    model: W2R2, batch_of: Callable[..., Any], samples: list[Any], frontend: Any, data_config: Any
) -> None:
    """Fused tokens are sums (`add`); hidden states equal those of transformers' forward."""
    set_geometry(model, 5.0)
    batch = batch_of(samples[:2])
    found = collect_tokens(model, [batch], 100, seed=0)
    assert found.samples == ("four",) * 8 + ("three",) * 12 and len(found.layers) == 2
    np.testing.assert_allclose(found.two_d + found.three_d, found.fused, rtol=1e-5, atol=1e-6)
    for part in range(2):
        tokens: Any = (found.two_d, found.fused)[part]
        visual = replace_tokens(model, batch, torch.from_numpy(tokens))
        with torch.no_grad():
            states = model.family.language_model(model.base)(
                inputs_embeds=insert_visual_tokens(batch, embed_tokens(model.base, batch), visual),
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                output_hidden_states=True,
            ).hidden_states
        for layer in range(2):
            expected = states[layer].flatten(0, 1)[batch.visual_tokens].numpy()
            np.testing.assert_allclose(found.layers[layer][part], expected, rtol=1e-4, atol=1e-5)


def replace_tokens(model: W2R2, batch: Any, tokens: torch.Tensor) -> Any:
    visual = model.encode_2d(batch.visuals)
    visual.pooler_output = torch.split(tokens, [len(part) for part in visual.pooler_output])
    return visual


def test_the_selection_does_not_depend_on_the_batch_size(
    model: W2R2, samples: list[Any], frontend: Any, data_config: Any
) -> None:
    found = [
        collect_tokens(model, labeled_loader(samples, frontend, data_config(), size), 5, seed=3) for size in (1, 2, 3)
    ]
    for other in found[1:]:
        assert other.samples == found[0].samples and len(other.samples) == 15
        np.testing.assert_allclose(other.fused, found[0].fused, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.layers[1][1], found[0].layers[1][1], rtol=1e-4, atol=1e-5)
    again = collect_tokens(model, labeled_loader(samples, frontend, data_config(), 1), 5, seed=4)
    assert not np.allclose(again.two_d, found[0].two_d)


def test_a_model_without_geometry(model: W2R2, samples: list[Any], frontend: Any, data_config: Any) -> None:
    """Fused tokens are 2D tokens, in every layer."""
    set_geometry(model, 0.0)
    found = feature_map(model, frontend, data_config(), samples, OPTIONS)
    assert len(found.samples) == 32 and set(found.samples) == {"four", "three", "twelve"}  # 8 + 12 + 12 of 24
    for same in (found.clouds["2d_fused"], *found.layers):
        assert same.cka == pytest.approx(1) and same.centroid_distance == 0 and same.norm_ratio == 1
    assert found.clouds["2d_3d"].norm_ratio == 0 and np.isnan(found.clouds["2d_3d"].cka)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["clouds"]["2d_3d"]["cka"] is None and len(content["layers"]) == 2
    assert {name: np.shape(points) for name, points in content["points"].items()} == {
        name: (32, 2) for name in ("2d", "3d", "fused")
    }
    assert content["options"]["perplexity"] == 5.0 and len(content["samples"]) == 32


def test_large_geometry_separates_the_clouds(model: W2R2, samples: list[Any], frontend: Any, data_config: Any) -> None:
    """A constant vector in the geometry moves fused tokens away from 2D tokens, without a change of their relations."""
    set_geometry(model, 0.0, constant=100.0)
    found = feature_map(model, frontend, data_config(), samples, OPTIONS)
    moved = found.clouds["2d_fused"]
    assert moved.centroid_distance > 10 and moved.neighbour_mix == 0 and moved.norm_ratio > 10
    assert moved.cka == pytest.approx(1, abs=1e-4) and moved.expected_mix == pytest.approx(32 / 63)
    gap = np.linalg.norm(found.points["2d"].mean(0) - found.points["fused"].mean(0))
    assert gap > 2 * found.points["2d"].std()


def test_equal_seeds_give_equal_maps(model: W2R2, samples: list[Any], frontend: Any, data_config: Any) -> None:
    maps = [
        feature_map(model, frontend, data_config(questions_per_scene=2), samples, replace(OPTIONS, **changes)).to_json()
        for changes in ({}, {}, {"perplexity": 8.0}, {"seed": 2})
    ]
    assert maps[0] == maps[1] and maps[0]["clouds"] == maps[2]["clouds"]
    assert maps[0]["points"] != maps[2]["points"] and maps[0]["clouds"] != maps[3]["clouds"]


def test_samples_have_different_frames_and_an_answer(samples: list[Any], text_samples: list[Any]) -> None:
    hidden = replace(samples[2], id="hidden", answer="")
    again = replace(samples[0], id="again")
    chosen = [samples[0], again, *text_samples, hidden, samples[1]]
    assert [sample.id for sample in with_different_frames(chosen, 9, seed=0)] == ["four", "three"]
    assert len({with_different_frames(samples, 1, seed=seed)[0].id for seed in range(20)}) == 3
    with pytest.raises(ValueError, match="frames and an answer"):
        with_different_frames([hidden, *text_samples], 9, seed=0)


@pytest.mark.parametrize("changes", [{"perplexity": 12.0, "tokens": 4}, {"neighbours": 9, "tokens": 4}, {"tokens": 3}])
def test_too_few_tokens_for_an_option(
    model: W2R2, samples: list[Any], frontend: Any, data_config: Any, changes: dict[str, Any]
) -> None:
    options = replace(OPTIONS, samples=1, **changes)
    with pytest.raises(ValueError, match=f"has {options.tokens} tokens.*perplexity.*neighbours"):
        feature_map(model, frontend, data_config(), samples, options)


def test_clouds_keep_their_order_in_the_picture() -> None:
    """Two far clouds and one on top of the first."""
    random = np.random.default_rng(0)
    a = random.normal(size=(20, 4))
    first, far, near = tsne([a, a + 50, a + 0.01], perplexity=5, seed=0)
    assert np.linalg.norm(first.mean(0) - far.mean(0)) > 3 * np.linalg.norm(first.mean(0) - near.mean(0))


def test_scikit_learn_is_optional(
    model: W2R2, samples: list[Any], frontend: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "import_problem", lambda name: f"is not installed as {name}")
    with pytest.raises(ValueError, match=r"not installed as sklearn.*w2r2-ds\[diagnostics\]"):
        feature_map(model, frontend, data_config(), samples, OPTIONS)
