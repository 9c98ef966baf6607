"""SIGKILL at random times of a save: 5 kills, and 50 more with `-m nightly`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import arguments
from inject_from_outside import kill_during_save
from runs import World
from scenario import Row, assert_equals_reference, record_rows, run_with_faults

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

KILLS = 5
KILL_REST_AFTER = 1.5
"""Seconds from the kill of one rank to the kill of the other, to save time: the watchdog needs ten."""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 11))])
def test_a_run_killed_during_saves_equals_the_reference_run(
    world: World, reference_run: Path, tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    draw, rows, kills = random.Random(seed), list[Row](), 0
    for attempt in range(KILLS):  # another run only if this one finished before all kills
        out = tmp_path / f"run{attempt}"
        faults = [kill_during_save(draw, KILL_REST_AFTER if seed == 0 else 0.0) for _ in range(KILLS - kills)]
        rows += run_with_faults(out, arguments(world, out), faults)
        assert_equals_reference(out, reference_run)
        kills = sum(row.injected for row in rows)
        if kills == KILLS:
            break
    assert kills == KILLS
    record_rows(record_property, rows)
