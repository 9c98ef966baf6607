"""Fixtures: a training step whose LoRA and merger weights are not zero."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from objectives import objective_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import build_model, trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step


@pytest.fixture(scope="session")
def random_model() -> Callable[[RunConfig, bool], W2R2]:
    """Function `random_model(config, fresh)`: a new model; equal ones are copies of the first, which is faster."""

    @functools.cache
    def build(description: str) -> W2R2:
        config, fresh = described[description]
        model = build_model(config.model, torch.device("cpu"), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                if fresh:
                    continue
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                if "geometry_merger.mlp" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    described: dict[str, tuple[RunConfig, bool]] = {}

    def copy_of(config: RunConfig, fresh: bool) -> W2R2:
        description = f"{config.model} {fresh}"
        described[description] = config, fresh
        return copy.deepcopy(build(description))

    return copy_of


@pytest.fixture
def make_step(
    model_config: Any, frontend: Any, tables: Any, random_model: Callable[[RunConfig, bool], W2R2]
) -> Callable[..., W2R2Step]:
    """Function `make_step(**changes)`: changes of the objective or the model, such as `push` or `lora_dropout`.

    LoRA B matrices and the merger have random weights; with `fresh` they keep their initial ones.
    """

    def make(fresh: bool = False, **changes: Any) -> W2R2Step:
        model_changes = {name: changes.pop(name) for name in list(changes) if hasattr(model_config, name)}
        config = RunConfig(model=replace(model_config, **model_changes), objective=objective_config(**changes))
        model = random_model(config, fresh)
        return W2R2Step(model, config, Scorer(tables, frontend.tokenizer, config.objective)).train()

    return make


@pytest.fixture
def step(make_step: Callable[..., W2R2Step]) -> W2R2Step:
    return make_step()
