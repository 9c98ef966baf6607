"""The hang detector with a slow rank, a hanging rank, and a stopped rank that continues after the restart."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fault_runs import LOST, Launch, arguments, run_to_end, steps_logged
from runs import World
from scenario import Fault, Row, assert_equals_reference, record_rows, run_with_faults

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(1800)]

Record = Callable[[str, object], None]
HANG_SECONDS = 20


def test_a_slow_rank_does_not_end_the_run(
    world: World, reference_run: Path, tmp_path: Path, record_property: Record
) -> None:
    """Half of `train.hang_seconds` in every forward does not trigger the hang detector."""
    out = tmp_path / "run"
    slow = {1: {"kind": "slow", "call": 2, "seconds": HANG_SECONDS / 2}}
    rows = run_with_faults(
        out, arguments(world, out, train__hang_seconds=HANG_SECONDS), [Fault("slow rank", (0,), in_process=slow)]
    )
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_ends_all_ranks(
    world: World, reference_run: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    out = tmp_path / "run"
    hangs = {rank: {"kind": "sleep", "call": 5, "seconds": 3600}}
    fault = Fault("rank hangs", (LOST,), in_process=hangs, logged=(f"rank {rank}",))
    rows = run_with_faults(out, arguments(world, out, train__hang_seconds=HANG_SECONDS), [fault])
    assert_equals_reference(out, reference_run)
    record_rows(record_property, rows)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_exits_when_continued_after_a_restart(
    world: World, reference_run: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    """SIGSTOP as on a suspended node; the other rank exits; SIGCONT during the next launch: the old rank must exit."""
    out, other = tmp_path / "run", 1 - rank
    row = Row("rank frozen, woken after the restart", injected=1, restarts=1)
    with Launch(out, arguments(world, out)) as launch:
        assert launch.wait_until(lambda: steps_logged(out) >= 2), launch.output()
        launch.send(signal.SIGSTOP, rank)
        frozen = time.monotonic()
        while other in launch.running():
            assert time.monotonic() < frozen + 60, launch.output()
            time.sleep(0.1)
        row.ended.append(time.monotonic() - frozen)
        assert launch.processes[other].code == LOST, launch.output()
        with Launch(out, arguments(world, out)) as second:
            before = steps_logged(out)
            assert second.wait_until(lambda: steps_logged(out) != before), second.output()
            launch.send(signal.SIGCONT, rank)
            assert second.wait() == [0, 0], second.output()
        codes = launch.wait(60)
        assert codes[rank] not in (0, None), launch.output()
    run_to_end(out, arguments(world, out))
    assert_equals_reference(out, reference_run)
    record_rows(record_property, [row])
