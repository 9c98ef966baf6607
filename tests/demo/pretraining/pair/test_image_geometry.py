"""Geometry of images in the pretraining: the features and logits are those of the model with VGGT, on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretraining_pair import DATA, LoadedPair, load_pair
from w2r2_ds.config.schema import ModelConfig
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.demo.pretraining.pair.encoders import geometry_config, identity
from w2r2_ds.demo.pretraining.pair.evaluate import FRAMES
from w2r2_ds.demo.pretraining.pair.rooms.frames import turns_to_camera
from w2r2_ds.demo.pretraining.pair.rooms.geometry import VIEWS, ImageGeometry, view_geometry
from w2r2_ds.demo.pretraining.pair.rooms.tasks import grounding, targets
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, draw_view, make_view
from w2r2_ds.demo.pretraining.pair.stages.questions import pack, packed_states


@pytest.fixture(scope="module")
def loaded(shipped: Path, written: Any) -> LoadedPair:
    """A model with VGGT and a random merger."""
    geometry = geometry_config("vggt")
    config = ModelConfig(vlm=str(shipped / "vlm"), geometry=geometry, merger_hidden=64, dtype="float32", lora_rank=2)
    loaded = load_pair(config, written.rooms)
    with torch.no_grad():  # from the small initial weights to tokens of the size of embeddings
        for linear in (loaded.model.geometry_merger.mlp[0], loaded.model.geometry_merger.mlp[2]):
            linear.weight.mul_(3)
    return loaded


@torch.no_grad()
def test_logits_equal_those_of_the_model(loaded: LoadedPair, written: Any) -> None:
    """Float16 keeps 11 bits of a feature. With its rounding, logits of about 10 differ by orders of summation only."""
    view = make_view(loaded.data, 0, FRAMES)
    own = {q.question: q for q in (grounding(loaded.data, view, int(i)) for i in targets(loaded.data, view))}
    samples = [s for s in written.sets["scanrefer"] if s.scene_id == "scene0000_00" and s.question in own][:3]
    processor = make_processor(loaded.frontend, DATA)
    batch = make_collate(loaded.frontend, DATA)([processor(sample, with_answer=True) for sample in samples])
    model, pair = loaded.model, loaded.pair
    features = model.encode_3d(batch.visuals)
    torch.testing.assert_close(view.geometry, features[0], rtol=2**-11, atol=1e-5)
    merged = model.merge([each.half().float() for each in features])
    visual = model.encode_2d(batch.visuals)
    expected = model.logits(model.answer_hidden_states(batch, model.fuse(visual, merged)))
    packed = pack(pair.prompts, [[own[sample.question] for sample in samples]])
    states, _ = packed_states(pair, [view], torch.tensor([True]), packed)
    torch.testing.assert_close(pair.logits(states), expected, rtol=0, atol=1e-4)
    without, _ = packed_states(pair, [view], torch.tensor([False]), packed)
    assert (pair.logits(without) - expected).abs().max() > 0.1, "geometry matters"


def test_views_are_few_in_the_demos_frame_and_encoded_once(loaded: LoadedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RoomData(
        loaded.data.rooms, loaded.data.features, view_geometry(loaded.model.geometry, loaded.data.rooms, seed=1)
    )
    encoded = []

    def encode(frames: torch.Tensor) -> torch.Tensor:
        encoded.append(frames)
        return torch.full((4, 1, 1, 1), float(len(encoded)))

    monkeypatch.setattr(loaded.model.geometry, "encode_frames", encode)
    rng = np.random.default_rng(0)
    found: dict[tuple[int, bytes, bool], float] = {}
    for _ in range(60):
        view = draw_view(data, rng, demo_frame=False)
        assert view.frame.turns == turns_to_camera(data.rooms, view.room, int(view.frames[0]), view.frame.mirrored)
        key = (view.room, view.frames.tobytes(), view.frame.mirrored)
        number = float(view.geometry[0, 0, 0, 0])
        assert found.setdefault(key, number) == number
        images = data.rooms.images[view.room, view.frames]
        images = images[:, :, ::-1] if view.frame.mirrored else images
        assert np.array_equal(encoded[int(number) - 1].permute(0, 2, 3, 1).numpy(), images)
    # Two views of a room may have the same frames.
    assert 2 < len(encoded) == len(found) <= 2 * VIEWS
    assert {mirrored for _, _, mirrored in found} == {True, False}


def test_the_kind_of_geometry_follows_from_the_encoder(loaded: LoadedPair) -> None:
    assert isinstance(loaded.data.geometry, ImageGeometry)
    assert identity(geometry_config("point_map")) == {} and set(identity(geometry_config("vggt"))) == {"vggt"}
