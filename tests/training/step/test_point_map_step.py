"""Training steps, decoding and shuffled geometry with the point-map encoder on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from packed_batches import packed_of, questions
from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.data.loader import make_processor, prompt_loader
from w2r2_ds.evaluation.generate import generate_tokens
from w2r2_ds.evaluation.shuffle import ShuffledGeometry
from w2r2_ds.models.build import VlmFrontend, load_frontend, trainable
from w2r2_ds.models.merger import pair_frames
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.training.throughput import geometry_flops
from w2r2_ds.types.batch import Batch

Pack = Callable[..., Batch]


@pytest.fixture(scope="module")
def geometry() -> GeometryConfig:
    return GeometryConfig(name="point_map", reference_frame="world")


@pytest.fixture(scope="module")
def point_frontend(model_config: ModelConfig, geometry: GeometryConfig) -> VlmFrontend:
    return load_frontend(replace(model_config, geometry=geometry))


@pytest.fixture(scope="module")
def pack(point_frontend: VlmFrontend, data_config: Any) -> Pack:
    return packed_of(point_frontend, data_config)


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("zero", ["merged", "features"])
def test_a_step_trains_the_merger_and_depends_on_the_points(
    make_step: Callable[..., W2R2Step],
    geometry: GeometryConfig,
    pack: Pack,
    depth_samples: list[Any],
    visual: str,
    zero: str,
) -> None:
    step = make_step(geometry=geometry, zero_geometry=zero)
    batch = pack(depth_samples, visual=visual)
    loss, _ = step(batch)
    loss.backward()
    weights = trainable(step.model)
    assert torch.isfinite(loss)
    for name, weight in weights.items():
        assert weight.grad is not None and weight.grad.norm() > 0, name
    assert weights["geometry_merger.ln_q.weight"].shape == (184,)
    # One row of features per patch of the vision tower; pairs of frames are averaged in a video.
    features, frames = step.model.encode_3d(batch.visuals), batch.visuals.geometry_frames
    assert [each.shape for each in frames if each is not None] == [(4, 3, 4, 4, 3), (3, 4, 4, 4, 3), (12, 3, 4, 4, 3)]
    for each, points in zip(features, frames, strict=True):
        assert points is not None
        expected = step.model.geometry.encode(points)
        assert torch.equal(each, pair_frames(expected) if visual == "video" else expected)
    assert len(step.model.merge(features)) == sum(batch.visuals.sizes)
    # The fused loss is another one with points that are moved by half a metre, and without points.
    with torch.no_grad():
        moved = tuple(points + 0.5 for points in frames if points is not None)
        no_depth = tuple(torch.full_like(points, torch.nan) for points in frames if points is not None)
        changed = [
            step(replace(batch, visuals=replace(batch.visuals, geometry_frames=g)))[0] for g in (moved, no_depth)
        ]
        assert torch.equal(step(batch)[0], loss)
    assert all((other - loss).abs() > 1e-4 for other in changed)
    assert geometry_flops(step.model.geometry, batch.visuals) == 0


def test_scene_packing_shares_the_point_maps(
    make_step: Callable[..., W2R2Step], geometry: GeometryConfig, pack: Pack, depth_samples: list[Any]
) -> None:
    step = make_step(geometry=geometry)
    step.model.family.use_packed_attention(step.model.base)
    asked = questions(depth_samples[0], 3)
    packed = pack(asked, questions_per_scene=3)
    assert len(packed.visuals.geometry_frames) == 1
    with torch.no_grad():
        together, separate = step(packed)[0], sum(step(pack([sample]))[0] for sample in asked)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=0)


def test_a_batch_without_frames(
    make_step: Callable[..., W2R2Step], geometry: GeometryConfig, pack: Pack, text_samples: list[Any]
) -> None:
    """Its point map has no depth; the merger gets a zero gradient, not NaN."""
    step = make_step(geometry=geometry)
    batch = pack(text_samples)
    (points,) = batch.visuals.geometry_frames
    assert batch.visuals.dummy and points is not None and points.isnan().all()
    loss, _ = step(batch)
    loss.backward()
    gradient = step.model.geometry_merger.mlp[0].weight.grad
    assert torch.isfinite(loss) and gradient is not None and not gradient.any()


def test_answers_are_generated_with_own_and_with_shuffled_points(
    make_step: Callable[..., W2R2Step],
    geometry: GeometryConfig,
    point_frontend: VlmFrontend,
    data_config: Any,
    depth_samples: list[Any],
) -> None:
    """Shuffled points are those of the other scene's frames, at the patches of a frame of the sample's size."""
    config, model = data_config(), make_step(geometry=geometry).model
    plain = make_processor(point_frontend, config)
    shuffled = ShuffledGeometry(plain, point_frontend.geometry, depth_samples)
    for sample in depth_samples:
        donor = shuffled.donor(sample.scene_id)
        own, other, wrong = (
            process.visual.geometry_frames
            for process in (plain(sample, False), plain(donor, False), shuffled(sample, False))
        )
        assert wrong.shape == own.shape and not torch.equal(wrong.nan_to_num(), own.nan_to_num())
        if other.shape[1:] == own.shape[1:]:
            expected = torch.stack([other[index % len(other)] for index in range(len(own))])
            assert torch.equal(wrong.nan_to_num(), expected.nan_to_num())
    merged = []
    for processor in (None, shuffled):
        (batch,) = prompt_loader(depth_samples, point_frontend, config, 3, processor)
        answers = generate_tokens(model, batch, point_frontend.tokenizer, "fused", 3, config.video_fps)
        assert [len(ids) > 0 for ids in answers] == [True] * 3
        merged.append(model.merge(model.encode_3d(batch.visuals)))
    assert ((merged[0] - merged[1]).norm(dim=-1) > 0.1 * merged[0].norm(dim=-1)).all()
