"""Fixture: the undisturbed run, which all others must equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_runs import arguments, undisturbed
from runs import World
from shared_fixtures import once, shared_base


@pytest.fixture(scope="session")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks, all steps, one start; made once for all workers."""
    base = shared_base(tmp_path_factory.getbasetemp())
    out = base / "calm"
    once(base, "calm", lambda: undisturbed(out, arguments(world, out)))
    return out
