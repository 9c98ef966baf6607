"""LoRA projections under ZeRO-3: bound in leaf modules, computed by PEFT without leaf modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fork_server import HELPERS
from runs import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_gradients_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, HELPERS / "ranks" / "sharded_ranks.py", tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        # Two layers of two projections, in the forward pass and in its recomputation.
        assert found["leaf"][0] == 8 and found["no leaf"][0] == 0
        assert found["leaf"][1] < 1e-6 and found["no leaf"][1] < 1e-6  # float32
