"""A rank that is slow, that hangs, or that is frozen and continues."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import LOST, Start, arguments, steps_logged, undisturbed
from runs import World
from scenario import Fault, Row, assert_as_undisturbed, note, suffer

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
HANG_SECONDS = 20


def test_a_slow_rank_does_not_end_the_run(world: World, calm: Path, tmp_path: Path, record_property: Record) -> None:
    """Half the limit in every forward: no false alarm."""
    out = tmp_path / "run"
    slow = {1: {"kind": "slow", "call": 2, "seconds": HANG_SECONDS / 2}}
    rows = suffer(out, arguments(world, out, train__hang_seconds=HANG_SECONDS), [Fault("slow rank", (0,), inside=slow)])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_job(
    world: World, calm: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    out = tmp_path / "run"
    hangs = {rank: {"kind": "sleep", "call": 5, "seconds": 3600}}
    fault = Fault("rank hangs", (LOST,), inside=hangs, logged=(f"rank {rank}",))
    rows = suffer(out, arguments(world, out, train__hang_seconds=HANG_SECONDS), [fault])
    assert_as_undisturbed(out, calm)
    note(record_property, rows)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_wakes_after_its_job_was_started_again(
    world: World, calm: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    """Stopped (as a machine that is suspended), given up by the other, woken while the next start trains: it ends."""
    out, other = tmp_path / "run", 1 - rank
    row = Row("rank frozen, woken after the restart", injected=1, restarts=1)
    with Start(out, arguments(world, out)) as start:
        assert start.until(lambda: steps_logged(out) >= 2), start.output()
        start.send(signal.SIGSTOP, rank)
        frozen = time.monotonic()
        while other in start.running():
            assert time.monotonic() < frozen + 60, start.output()
            time.sleep(0.1)
        row.ended.append(time.monotonic() - frozen)
        assert start.processes[other].code == LOST, start.output()
        with Start(out, arguments(world, out)) as again:
            before = steps_logged(out)
            assert again.until(lambda: steps_logged(out) != before), again.output()
            start.send(signal.SIGCONT, rank)
            assert again.wait() == [0, 0], again.output()
        codes = start.wait(60)
        assert codes[rank] not in (0, None), start.output()
    undisturbed(out, arguments(world, out))
    assert_as_undisturbed(out, calm)
    note(record_property, [row])
