"""The small world and its run, made once per session (tests/runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import World, make_world, train_once, world_folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Scenes and warmed-up tiny models."""
    return make_world(world_folder(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    """A run of 30 steps on one rank."""
    return train_once(world)
