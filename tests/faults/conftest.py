"""Fixture: the reference run, the same command without faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from fault_runs import arguments, run_to_end
from runs import World
from shared_fixtures import once, shared_base


@pytest.fixture(scope="session")
def reference_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder after all steps on two ranks in one launch; created once for all pytest workers."""
    base = shared_base(tmp_path_factory.getbasetemp())
    out = base / "reference"
    once(base, "reference", lambda: run_to_end(out, arguments(world, out)))
    return out
