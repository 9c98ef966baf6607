"""kill -9 at random moments of a save: 5 times here, 50 times more with `-m nightly`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import arguments
from inject_from_outside import in_a_save
from runs import World
from scenario import Row, assert_as_undisturbed, note, suffer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

KILLS = 5
PATIENCE = 1.5
"""Seconds, where every second counts: the watchdog, which test_bad_day.py waits for too, needs ten for a rank."""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 11))])
def test_a_kill_during_a_save_costs_nothing(
    world: World, calm: Path, tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    draw, rows, kills = random.Random(seed), list[Row](), 0
    for attempt in range(KILLS):  # the second only where a kill came when the run was done
        out = tmp_path / f"run{attempt}"
        faults = [in_a_save(draw, PATIENCE if seed == 0 else 0.0) for _ in range(KILLS - kills)]
        rows += suffer(out, arguments(world, out), faults)
        assert_as_undisturbed(out, calm)
        kills = sum(row.injected for row in rows)
        if kills == KILLS:
            break
    assert kills == KILLS
    note(record_property, rows)
