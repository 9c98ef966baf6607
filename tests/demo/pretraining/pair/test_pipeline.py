"""Prompts, images, points and logits of the pretraining equal those of data loading and model on files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretraining_pair import DATA, LoadedPair, load_pair
from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.demo.pretraining.pair.evaluate import FRAMES
from w2r2_ds.demo.pretraining.pair.rooms.room_set import GRID
from w2r2_ds.demo.pretraining.pair.rooms.tasks import TaskQuestion, answers, caption, grounding, targets
from w2r2_ds.demo.pretraining.pair.rooms.views import make_view
from w2r2_ds.demo.pretraining.pair.stages.questions import pack, packed_states
from w2r2_ds.models.merger_io import MERGER


def model_config(folder: Path) -> ModelConfig:
    """The demo's model with the shipped weights, computed in float32."""
    geometry = GeometryConfig(name="point_map", reference_frame="world")
    return ModelConfig(
        vlm=str(folder / "vlm"),
        geometry=geometry,
        merger=str(folder / MERGER),
        merger_hidden=256,
        dtype="float32",
        lora_rank=2,
    )


@pytest.fixture(scope="module")
def loaded(shipped: Path, written: Any) -> LoadedPair:
    return load_pair(model_config(shipped), written.rooms)


def own_questions(loaded: LoadedPair, room: int, task: str) -> list[TaskQuestion]:
    """All questions of the pretraining about the frames of a sample."""
    view = make_view(loaded.data, room, FRAMES)
    found = targets(loaded.data, view).tolist()
    return {
        "scanrefer": [grounding(loaded.data, view, i, with_color) for i in found for with_color in (True, False)],
        "scan2cap": [caption(loaded.data, view, i) for i in found],
        "scanqa": answers(loaded.data, view),
    }[task]


@pytest.mark.parametrize("task", ["scanrefer", "scan2cap", "scanqa"])
def test_token_ids_images_and_points_equal_those_of_the_processor(loaded: LoadedPair, written: Any, task: str) -> None:
    processor, prompts = make_processor(loaded.frontend, DATA), loaded.pair.prompts
    compared = 0
    for sample in written.sets[task]:
        room = int(sample.scene_id[5:9])
        own = [q for q in own_questions(loaded, room, task) if q.question == sample.question]
        if not own or (task != "scanrefer" and own[0].answer != sample.answer):
            continue  # the frames do not show the object, or the label is the class alone or a second reference
        features = processor(sample, with_answer=True)
        answer = prompts.answer(own[0].answer)
        assert features.input_ids.tolist() == [*prompts.prefix.tolist(), *prompts.question(own[0].question), *answer]
        assert features.num_answer_tokens == len(answer)
        assert torch.equal(features.visual.grid_thw, torch.tensor([[1, *GRID]] * len(FRAMES)))
        assert features.visual.tower_frames is not None
        frames = features.visual.tower_frames.permute(0, 2, 3, 1).numpy()
        assert np.array_equal(frames, loaded.data.rooms.images[room, FRAMES])
        # Poses and alignment of the files are rounded to 1e-12, points are float32.
        # The first three of the channels of a point are its coordinates.
        points = make_view(loaded.data, room, FRAMES).geometry.unflatten(-1, (4, -1))[..., :3]
        torch.testing.assert_close(features.visual.geometry_frames, points, rtol=0, atol=1e-5)
        compared += 1
    assert compared >= 4


@torch.no_grad()
def test_logits_of_packed_questions_equal_those_of_the_model(loaded: LoadedPair, written: Any) -> None:
    """Fused and in 2D only; float32 with other orders of summation, logits of about 10."""
    samples = [sample for sample in written.sets["scanrefer"] if sample.scene_id == "scene0000_00"]
    own = {q.question: q for q in own_questions(loaded, 0, "scanrefer")}
    samples = [sample for sample in samples if sample.question in own][:3]
    processor = make_processor(loaded.frontend, DATA)
    batch = make_collate(loaded.frontend, DATA)([processor(sample, with_answer=True) for sample in samples])
    model, pair = loaded.model, loaded.pair
    packed = pack(pair.prompts, [[own[sample.question] for sample in samples]])
    visual = model.encode_2d(batch.visuals)
    for fused in (True, False):
        geometry = model.merge(model.encode_3d(batch.visuals)) if fused else None
        expected = model.logits(model.answer_hidden_states(batch, model.fuse(visual, geometry)))
        view = make_view(loaded.data, 0, FRAMES)
        states, _ = packed_states(pair, [view], torch.tensor([fused]), packed)
        torch.testing.assert_close(pair.logits(states), expected, rtol=0, atol=1e-4)
