"""kill -9 at random moments of a save: 5 times here, 50 times more with `-m nightly`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_outside import in_a_save
from fault_runs import arguments
from fault_story import assert_as_undisturbed, note, suffer
from runs import World

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

KILLS = 5


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 11))])
def test_a_kill_during_a_save_costs_nothing(
    world: World, calm: Path, tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    out, draw = tmp_path / "run", random.Random(seed)
    rows = suffer(out, arguments(world, out), [in_a_save(draw) for _ in range(KILLS)])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)
