"""Attention anchors of a tiny model whose attention is known, and their heat maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anchor_batches import TYPICAL, anchored, put_attention_on, write_intrinsic
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.diagnostics.attention.anchors import PASSES, AnchorSummary, attention_anchors
from w2r2_ds.diagnostics.attention.heat_maps import GAP, WIDTH, save_heat_map
from w2r2_ds.diagnostics.attention.target_tokens import target_coverage
from w2r2_ds.models.attention.visual_attention import VisualAttention
from w2r2_ds.models.build import build_model
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.anchor import find_anchors

TOKENS = [5, 9, 30]
"""Anchored visual token of every sample of a batch: of tokens 0 to 7, 8 to 19 and 20 to 43."""


@pytest.fixture
def model(model_config: Any) -> W2R2:
    return build_model(model_config, torch.device("cpu"), seed=1).eval()


@pytest.fixture
def anchored_batch(frontend: Any, data_config: Any) -> Callable[..., Any]:
    return anchored(frontend, data_config)


@torch.no_grad()
def remove_geometry(model: W2R2) -> None:
    """Fused tokens are then 2D tokens."""
    model.geometry_merger.mlp[2].weight.zero_()


def test_known_attention_gives_a_known_anchor(
    model: W2R2, anchored_batch: Callable[..., Any], samples: list[Any], frontend: Any, data_config: Any
) -> None:
    remove_geometry(model)
    # The second target is as large as the room, so that every token is on it.
    large = samples[1].target.box * np.array([1, 1, 1, 4, 1, 4, 1, 1, 1])
    samples = [samples[0], replace(samples[1], target=replace(samples[1].target, box=large)), samples[2]]
    batch = anchored_batch(samples)
    put_attention_on(model, batch, TOKENS)
    found = attention_anchors(model, frontend, data_config(), samples, TYPICAL, batch_size=2)
    expected = find_anchors(torch.eye(44)[TOKENS], batch)
    assert found.same_anchor == 1 and found.not_in_view == 0
    for name in PASSES:
        records = found.records[name]
        assert [record.sample for record in records] == [sample.id for sample in samples]
        assert [record.token for record in records] == [5, 1, 10]  # within the sample
        assert [record.frame for record in records] == expected.frame.tolist() == [2, 0, 5]
        for index, record in enumerate(records):
            np.testing.assert_allclose(record.center, expected.center[index].numpy(), rtol=1e-6)
            assert record.size == tuple(TYPICAL.class_sizes[17].tolist())
            assert record.attention.argmax() == record.token and len(record.attention) == len(record.coverage)
            # All of the first layer, and half of the mean of both layers at least.
            assert record.visual_share[0] > 0.99 and record.attention[record.token] > 0.5
            target = samples[index].target.box[:3]
            assert record.distance == pytest.approx(float(np.linalg.norm(np.array(record.center) - target)))
            assert record.on_target == (record.coverage[record.token] >= 0.5)
            assert record.target_mass[0] == pytest.approx(record.coverage[record.token], abs=0.01)
    assert records[0].pixel == pytest.approx((59.5, 19.5))
    assert [record.on_target for record in records] == [False, True, False]


def test_uniform_attention_has_the_targets_share_of_the_area(
    model: W2R2, anchored_batch: Callable[..., Any], samples: list[Any], frontend: Any, data_config: Any
) -> None:
    put_attention_on(model, anchored_batch(samples), [])
    found = attention_anchors(model, frontend, data_config(), samples, TYPICAL)
    for record in (*found.records["2d_only"], *found.records["fused"]):
        assert 0 < record.target_area < 1
        assert record.target_mass == pytest.approx([record.target_area] * 2, rel=1e-5)
        assert record.attention.std() < 1e-6


def test_both_passes_are_those_of_the_model(
    model: W2R2, anchored_batch: Callable[..., Any], samples: list[Any], frontend: Any, data_config: Any
) -> None:
    """Recorded in passes made here; geometry changes the attention of the fused pass only."""
    with torch.no_grad():
        model.geometry_merger.mlp[2].weight.mul_(2000)
    batch = anchored_batch(samples[:1])
    found = attention_anchors(model, frontend, data_config(questions_per_scene=2), samples[:1], TYPICAL)
    visual, merged = model.encode_2d(batch.visuals), model.merge(model.encode_3d(batch.visuals))
    for name, geometry in (("2d_only", None), ("fused", merged)):
        recorder = VisualAttention(model.family, batch)
        with torch.no_grad():
            model.answer_hidden_states(batch, model.fuse(visual, geometry), on_input=recorder)
        record = found.records[name][0]
        np.testing.assert_allclose(record.attention, recorder.mean_map()[0].numpy(), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(record.visual_share, [float(m.sum()) for m in recorder.maps], rtol=1e-4)
    one, other = (found.records[name][0].attention for name in PASSES)
    assert np.abs(one - other).max() > 1e-2 * one.max()  # equal passes differ by rounding, below 1e-5


def test_samples_without_a_visible_target_are_counted(
    model: W2R2,
    samples: list[Any],
    caption_sample: Any,
    text_samples: list[Any],
    frontend: Any,
    data_config: Any,
) -> None:
    write_intrinsic(samples[0])
    beside = samples[1].target.box + np.array([40.0, 0, 0, 0, 0, 0, 0, 0, 0])
    away = replace(samples[1], id="away", target=replace(samples[1].target, box=beside))
    hidden = replace(samples[1], id="hidden", answer="")
    chosen = [caption_sample, *text_samples, away, samples[0], hidden]
    found = attention_anchors(model, frontend, data_config(), chosen, TYPICAL)
    assert [record.sample for record in found.records["fused"]] == ["four"] and found.not_in_view == 1
    drawn = {
        attention_anchors(model, frontend, data_config(), samples, TYPICAL, count=1, seed=seed)
        .records["fused"][0]
        .sample
        for seed in range(8)
    }
    assert len(drawn) > 1
    for nothing in ([caption_sample, hidden], [away]):
        with pytest.raises(ValueError, match="target in a frame"):
            attention_anchors(model, frontend, data_config(), nothing, TYPICAL)


def test_json_and_summary(
    model: W2R2, anchored_batch: Callable[..., Any], samples: list[Any], frontend: Any, data_config: Any
) -> None:
    """A frame without a pose can be the anchor's: a pixel, but no place; null in JSON."""
    remove_geometry(model)
    lost = replace(samples[0], id="lost", cam_to_world=samples[0].cam_to_world.copy())
    lost.cam_to_world[2] = np.nan
    chosen = [lost, *samples[1:]]
    put_attention_on(model, anchored_batch(chosen), TOKENS)
    found = attention_anchors(model, frontend, data_config(), chosen, TYPICAL)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    first, *others = content["passes"]["fused"]["records"]
    assert first["frame"] == 2 and first["distance"] is None and first["center"] == [None] * 3 and first["s"] == 0
    assert all(record["distance"] > 0 and len(record["target_mass"]) == 2 for record in others)
    assert content["typical"]["depth"] == TYPICAL.depth and content["same_anchor"] == 1 and content["not_in_view"] == 0
    records = found.records["fused"]
    summary = AnchorSummary.of(records)
    assert summary.samples == 3 and summary.s == pytest.approx(np.mean([record.s for record in records]))
    assert summary.distance == pytest.approx(np.median([record.distance for record in records[1:]]))
    assert summary.target_mass[0] == pytest.approx(np.mean([record.target_mass[0] for record in records]))
    assert content["passes"]["fused"]["summary"]["acc25"] == np.mean([record.s >= 0.25 for record in records])
    alone = json.loads(json.dumps(replace(found, records={name: records[:1] for name in PASSES}).to_json()))
    assert alone["passes"]["2d_only"]["summary"]["distance"] is None


def test_heat_map_of_an_anchor(
    model: W2R2,
    anchored_batch: Callable[..., Any],
    samples: list[Any],
    frontend: Any,
    data_config: Any,
    tmp_path: Path,
) -> None:
    """Gray frames: red is attention, the cross is the anchor, the outline is the target."""
    remove_geometry(model)
    paths = []
    for index in range(12):
        paths.append(tmp_path / f"{index}.png")
        # Gray differs a little from frame to frame: equal tokens would get equal attention.
        Image.fromarray(np.random.default_rng(index).integers(100, 140, (60, 80, 3), dtype=np.uint8)).save(paths[-1])
    gray = replace(samples[2], frames=tuple(paths))
    batch = anchored_batch([gray])
    put_attention_on(model, batch, [11])  # the right one of the two tokens of frame 5
    found = attention_anchors(model, frontend, data_config(), [gray], TYPICAL)
    records = [found.records[name][0] for name in PASSES]
    preprocessor = VisualPreprocessor(frontend.family, frontend.vision, frontend.geometry, data_config())
    assert np.array_equal(records[0].coverage, target_coverage(gray, preprocessor))
    save_heat_map(tmp_path / "maps" / "one.png", gray, records, preprocessor, frames=3)
    picture = np.asarray(Image.open(tmp_path / "maps" / "one.png").convert("RGB")).astype(float)
    assert picture.shape == (2 * 180 + GAP, 3 * WIDTH + 2 * GAP, 3)
    redness = picture[..., 0] - picture[..., 2]
    columns = [redness[:180, start : start + WIDTH] for start in (0, WIDTH + GAP, 2 * (WIDTH + GAP))]
    hottest = int(np.argmax([column.mean() for column in columns]))
    assert columns[hottest][60:75, 200:].mean() > 100 and columns[hottest][60:75, :40].mean() < 30
    assert all(column.mean() < 10 for index, column in enumerate(columns) if index != hottest)
    # The cross is at (59.5, 19.5) of 80 x 60, three times as large here, in one frame of each row.
    x, y = hottest * (WIDTH + GAP) + 180, 60
    assert (picture[y, x] > 200).all() and (picture[y + 180 + GAP, x] > 200).all()
    green = (picture[..., 1] > 180) & (picture[..., 0] < 80)
    assert green[:180].sum() > 100 and green[184:].sum() > 100
