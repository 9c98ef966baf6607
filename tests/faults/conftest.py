"""The run that nothing happens to, which all others must equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_runs import arguments, undisturbed
from runs import World


@pytest.fixture(scope="session")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks, all steps, one start."""
    out = tmp_path_factory.mktemp("calm") / "run"
    undisturbed(out, arguments(world, out))
    return out
