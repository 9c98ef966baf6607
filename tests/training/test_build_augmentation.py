"""Geometry augmentation of a run: its loader changes answers by the run's options and seed, by default nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.config.schema import GeometryAugmentationConfig, GeometryConfig, RunConfig, TrainConfig
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.models.build import load_frontend
from w2r2_ds.training import build


def test_the_loader_of_a_run_changes_answers(
    depth_samples: list[Any], model_config: Any, data_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    frontend = load_frontend(replace(model_config, geometry=GeometryConfig(name="point_map", reference_frame="world")))
    mixture = Mixture([depth_samples], [1.0], [0])
    inputs = build.Inputs(torch.float32, {}, frontend, mixture, torch.device("cpu"), None)
    plain = {sample.id: sample.answer for sample in depth_samples}

    def answers(seed: int = 0, **augmentation: Any) -> list[tuple[str, str]]:
        data = data_config(geometry_augmentation=GeometryAugmentationConfig(**augmentation))
        train = TrainConfig(steps=2, global_batch=2, micro_batch=1, seed=seed)
        loader = build.make_loader(RunConfig(data=data, train=train), inputs, 0)
        return [(batch.ids[0], batch.answers[0]) for batch in loader]

    assert all(answer == plain[identity] for identity, answer in answers())
    changed = answers(scale=[1.5, 1.6])
    assert len(changed) == 4 and all(answer != plain[identity] for identity, answer in changed)
    assert changed == answers(scale=[1.5, 1.6]) and dict(changed) != dict(answers(seed=1, scale=[1.5, 1.6]))
