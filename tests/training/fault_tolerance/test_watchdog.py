"""The watchdog: a rank that hangs, dies or fails ends all ranks with the same message. Real processes, short limits."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from fork_server import HELPERS
from runs import environment
from w2r2_ds.training.fault_tolerance.activity import Activity, tracked_modules
from w2r2_ds.training.fault_tolerance.exit_codes import FAILED, LOST
from w2r2_ds.training.fault_tolerance.hang_detector import (
    FAILURE,
    LEFT,
    MISTAKE,
    Diagnosis,
    HangDetector,
    Limits,
    State,
)

SCRIPT = HELPERS / "ranks" / "watched_ranks.py"
HOST = socket.gethostname()
LIMITS = Limits(hang=600.0)
KILLED = -signal.SIGKILL
MODULE = "model.layers.1"


Ended = tuple[list[int], list[str]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """Exit codes and outputs of the ranks of each case of watched_ranks.py, which all run at once."""
    folder = tmp_path_factory.mktemp("watched")
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=environment(), check=True, timeout=200)
    codes = json.loads((folder / "codes.json").read_text())

    def case_result(case: str) -> Ended:
        return codes[case], [(folder / f"{case}.{rank}.log").read_text() for rank in range(len(codes[case]))]

    return case_result


def sentence(logs: str) -> str:
    """The only line of the watchdog in a rank's log."""
    found = re.findall(r"^watchdog, rank \d+: (.*)$", logs, re.MULTILINE)
    assert len(found) == 1, logs
    return str(found[0])


@pytest.mark.distributed
def test_a_hanging_rank_ends_all_ranks(ended: Callable[[str], Ended]) -> None:
    codes, logs = ended("hang")
    assert codes == [LOST] * 3
    assert len({sentence(each) for each in logs}) == 1
    assert re.fullmatch(
        rf"rank 1 \({HOST}\) hangs, for \d+ s, at step 2, forward, {MODULE}, in sleep \(watched_ranks.py:\d+\) "
        r"\(train.hang_seconds is 4\) \(exit code 75\)",
        sentence(logs[0]),
    )
    rows = logs[0].split("\n")
    top = next(i for i, row in enumerate(rows) if row.startswith("rank  host"))
    assert [row.split()[:4] for row in rows[top + 1 : top + 4]] == [[str(r), HOST, "2", "forward"] for r in range(3)]
    assert all(MODULE in row for row in rows[top + 1 : top + 4])
    assert "all_reduce (distributed_c10d.py:" in rows[top + 1]
    assert "in sleep" in logs[1].split("rank 1 is here:")[1]
    # Rank 2 prints its position; or, if rank 1 ended first, the traceback of the collective that lost its connection.
    assert "in all_reduce" in logs[2]


@pytest.mark.distributed
def test_the_watchdog_works_with_one_rank(ended: Callable[[str], Ended]) -> None:
    codes, logs = ended("hang-alone")
    assert codes == [LOST]
    assert f"rank 0 ({HOST}) hangs" in sentence(logs[0])


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["die", "stop"])
def test_a_dead_rank_ends_the_others(ended: Callable[[str], Ended], case: str) -> None:
    codes, logs = ended(case)
    assert codes == [LOST, KILLED, LOST]
    assert sentence(logs[0]) == sentence(logs[2])
    assert f"rank 1 ({HOST}) is gone: no heartbeat for " in sentence(logs[0])
    assert re.search(rf"^1 +{HOST} .*silent for \d+ s$", logs[0], re.MULTILINE)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["die-0", "stop-0"])
def test_without_rank_0_the_others_end_as_well(ended: Callable[[str], Ended], case: str) -> None:
    codes, logs = ended(case)
    assert codes == [KILLED, LOST]
    assert "rank 0 (127.0.0.1) is gone, or the network to it: rank 1" in sentence(logs[1])
    assert "step 2, forward" in sentence(logs[1])


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "rank"), [("mistake-0", 0), ("mistake", 1)])
def test_a_user_error_of_one_rank_ends_all_with_its_message(
    ended: Callable[[str], Ended], case: str, rank: int
) -> None:
    codes, logs = ended(case)
    assert codes == [FAILED, FAILED]
    assert logs[rank].endswith("train.py: frame 7 of scene0001_00 cannot be read; replace the file.\n")
    expected = f"rank {rank} ({HOST}) stopped at step 2, forward, {MODULE}: frame 7 of scene0001_00 cannot be read"
    assert expected in sentence(logs[1 - rank]) and "exit code 1" in sentence(logs[1 - rank])
    assert "Traceback" not in logs[0] + logs[1]


@pytest.mark.distributed
def test_out_of_memory_is_not_retried(ended: Callable[[str], Ended]) -> None:
    codes, logs = ended("memory")
    assert codes == [FAILED, FAILED]
    assert f"rank 1 ({HOST}) stopped at step 2, forward, {MODULE}: CUDA out of memory." in sentence(logs[0])


@pytest.mark.distributed
def test_other_exceptions_exit_with_lost(ended: Callable[[str], Ended]) -> None:
    codes, logs = ended("failure")
    assert codes == [LOST, LOST]
    assert sentence(logs[0]) == sentence(logs[1])
    assert f"rank 1 ({HOST}) failed at step 2, forward, {MODULE}: RuntimeError('no such kernel')" in sentence(logs[0])
    assert "Traceback" in logs[1] and "in failure" in logs[1]


@pytest.mark.distributed
def test_an_error_of_all_ranks_is_raised_unchanged(ended: Callable[[str], Ended]) -> None:
    codes, logs = ended("mistake-of-all")
    assert codes == [FAILED, FAILED]
    assert all("watchdog" not in each and each.endswith("replace the file.\n") for each in logs)


@pytest.mark.distributed
def test_a_healthy_run_is_unchanged(ended: Callable[[str], Ended]) -> None:
    assert ended("none") == ([0, 0], ["through\n", "through\n"])


def seen(
    detector: HangDetector, states: list[State], until: float, quiet: tuple[int, ...] = (), now: float = 0.0
) -> Diagnosis:
    """The diagnosis of a detector that is updated every two seconds; asserts that there is one."""
    diagnosis = None
    while now <= until and diagnosis is None:
        states = [replace(each, beat=each.beat + (r not in quiet)) for r, each in enumerate(states)]
        diagnosis, now = detector.update(states, now), now + 2
    assert diagnosis is not None
    return diagnosis


RUNS = State(beat=1, host="a", step=3, phase="forward", module="m", in_loop=True)


def test_a_detector_that_did_not_run_blames_no_rank() -> None:
    """After a suspension of the machine, or a long call that held Python's global lock."""
    detector = HangDetector(LIMITS, 2)
    assert detector.update([RUNS, RUNS], 0.0) is None
    for now in (1000.0, 2000.0, 3000.0):
        assert detector.update([RUNS, RUNS], now) is None  # at most 12 s are counted


def test_no_progress_before_the_loop_is_not_a_hang() -> None:
    detector = HangDetector(LIMITS, 2)
    loading = replace(RUNS, in_loop=False, idle_s=5000.0)
    assert detector.update([loading, loading], 0.0) is None
    assert detector.update([loading, replace(RUNS, idle_s=599.0, in_collective=True)], 2.0) is None
    diagnosis = detector.update([loading, replace(RUNS, idle_s=600.0, in_collective=True)], 4.0)
    assert diagnosis is not None and diagnosis.line.startswith("rank 0 (a) hangs")  # the other one waits for it


def test_a_rank_waiting_in_a_collective_is_not_blamed() -> None:
    waits = replace(RUNS, idle_s=601.0, location="all_reduce (c.py:1)", in_collective=True)
    sleeps = replace(RUNS, idle_s=599.0, location="read (d.py:2)")
    diagnosis = HangDetector(LIMITS, 3).update([waits, sleeps, waits], 0.0)
    assert diagnosis is not None and diagnosis.line.startswith(
        "rank 1 (a) hangs, for 599 s, at step 3, forward, m, in read"
    )
    diagnosis = HangDetector(LIMITS, 2).update([waits, replace(waits, idle_s=700.0)], 0.0)
    assert diagnosis is not None and "collectives, for each other or for a link that is down; rank 1" in diagnosis.line


def test_a_silent_rank_is_reported_before_ranks_that_hang() -> None:
    waits = replace(RUNS, idle_s=9.0, in_collective=True)
    diagnosis = seen(HangDetector(replace(LIMITS, hang=5.0), 2), [waits, RUNS], 60, quiet=(1,))
    assert "rank 0 (a) hangs" in diagnosis.line  # rank 1 had a heartbeat a moment ago
    detector = HangDetector(replace(LIMITS, hang=20.0), 2)
    for beat in range(4):
        assert detector.update([replace(RUNS, beat=beat + 1), RUNS], 2.0 * beat) is None
    diagnosis = seen(detector, [replace(RUNS, beat=9, idle_s=99.0, in_collective=True), RUNS], 60, quiet=(1,), now=8.0)
    assert diagnosis.line.startswith("rank 1 (a) is gone")


def test_the_dead_rank_is_blamed_not_those_that_lost_its_connection() -> None:
    lost = replace(RUNS, kind=FAILURE, error="RuntimeError('Connection closed by peer')")
    diagnosis = seen(HangDetector(LIMITS, 3), [lost, RUNS, lost], 20, quiet=(1,))
    assert diagnosis.code == LOST and diagnosis.line.startswith("rank 1 (a) is gone: no heartbeat for ")
    assert diagnosis.table.count("Connection closed by peer") == 2


def test_a_user_error_has_priority() -> None:
    states = [replace(RUNS, idle_s=900.0), replace(RUNS, kind=MISTAKE, error="no such file."), RUNS]
    diagnosis = seen(HangDetector(replace(LIMITS, hang=1000.0), 3), states, 20, quiet=(2,))
    assert (diagnosis.code, diagnosis.line) == (FAILED, "rank 1 (a) stopped at step 3, forward, m: no such file.")


def test_no_diagnosis_if_all_ranks_have_left() -> None:
    detector = HangDetector(LIMITS, 3)
    states = [replace(RUNS, kind=kind) for kind in (LEFT, MISTAKE, FAILURE)]
    assert [detector.update(states, 2.0 * i) for i in range(50)] == [None] * 50


def test_activity_names_modules_down_to_the_blocks() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})

    names = [name for name, _ in tracked_modules("model.vlm", Wrapped())]
    assert "model.vlm.layers.0" in names and "model.vlm.layers.0.0" not in names
    tower, activity = nn.Sequential(nn.Linear(2, 2)), Activity()
    before = activity.changed_at
    activity.follow("tower", tower)
    tower(torch.ones(1, 2))
    assert activity.module == "tower.0" and activity.changed_at > before


def test_without_a_collective_the_slowest_rank_is_blamed() -> None:
    """On a GPU a rank waits in its backward pass or in a read of a value, not in a collective's function."""
    ahead = replace(RUNS, changes=90, idle_s=601.0, phase="backward")
    behind = replace(RUNS, changes=40, idle_s=597.5)
    diagnosis = HangDetector(LIMITS, 3).update([ahead, behind, ahead], 0.0)
    assert diagnosis is not None and diagnosis.line.startswith("rank 1 (a) hangs, for 598 s, at step 3, forward")
    diagnosis = HangDetector(LIMITS, 2).update([ahead, replace(ahead, idle_s=602.0)], 0.0)
    assert diagnosis is not None and diagnosis.line.startswith(
        "all ranks that hang wait in collectives, for each other"
    )


def test_a_loading_rank_has_a_longer_heartbeat_limit() -> None:
    loading = replace(RUNS, in_loop=False)
    diagnosis = seen(HangDetector(LIMITS, 2), [loading, loading], 400, quiet=(1,))
    assert "rank 1 (a) is gone: no heartbeat for 300 s" in diagnosis.line
    assert "no heartbeat for 30 s" in seen(HangDetector(LIMITS, 2), [RUNS, RUNS], 400, quiet=(1,)).line
