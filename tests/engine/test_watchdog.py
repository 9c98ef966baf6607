"""A rank that hangs, dies or fails ends all others in time, with the same sentence; real processes, short limits."""

from __future__ import annotations

import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_processes import Ranks
from torch import nn

from w2r2_ds.engine.activity import Activity, blocks
from w2r2_ds.engine.exits import FAILED, LOST
from w2r2_ds.engine.judge import FAILURE, LEFT, MISTAKE, Judge, Limits, State, Verdict

SCRIPT = str(Path(__file__).with_name("watched_ranks.py"))
HOST = socket.gethostname()
LIMITS = Limits(hang=600.0)
KILLED = -signal.SIGKILL
MODULE = "model.layers.1"


def run(folder: Path, ranks: int, *arguments: object) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of ranks of watched_ranks.py; one that stopped itself is ended once the others have."""
    with Ranks(ranks, [SCRIPT, *map(str, arguments)], folder) as processes:
        stopped = [rank for rank in range(ranks) if arguments[:2] == ("stop", rank)]
        for rank, process in enumerate(processes.processes):
            if rank not in stopped:
                process.wait(100)
        for rank in stopped:
            processes.processes[rank].kill()
        return processes.codes(10), [processes.said(rank) for rank in range(ranks)]


def sentence(said: str) -> str:
    """What the watchdog of a rank said, once."""
    (line,) = re.findall(r"^watchdog, rank \d+: (.*)$", said, re.MULTILINE)
    return line


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_all(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 3, "sleep", 1)
    assert codes == [LOST] * 3
    assert len({sentence(each) for each in said}) == 1
    assert f"rank 1 ({HOST}) hangs: it stood still first, " in sentence(said[0])
    assert f" s ago, at step 2, forward, {MODULE} (train.hang_seconds is 4) (exit code 75)" in sentence(said[0])
    rows = said[0].split("\n")
    top = next(i for i, row in enumerate(rows) if row.startswith("rank  host"))
    assert [row.split()[:4] for row in rows[top + 1 : top + 4]] == [[str(r), HOST, "2", "forward"] for r in range(3)]
    assert all(MODULE in row for row in rows[top + 1 : top + 4])
    assert "in sleep" in said[1].split("rank 1 is here:")[1]
    assert "all_reduce" in said[2].split("rank 2 is here:")[1]


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["die", "stop"])
def test_a_rank_that_is_gone_ends_the_others(tmp_path: Path, how: str) -> None:
    codes, said = run(tmp_path, 3, how, 1)
    assert codes == [LOST, KILLED, LOST]
    assert sentence(said[0]) == sentence(said[2])
    assert f"rank 1 ({HOST}) is gone: not heard for " in sentence(said[0])
    assert f"was last at step 2, forward, {MODULE}" in sentence(said[0]) or how == "die"
    assert re.search(rf"^1 +{HOST} .*silent for \d+ s$", said[0], re.MULTILINE)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["die", "stop"])
def test_without_rank_0_the_others_end_as_well(tmp_path: Path, how: str) -> None:
    codes, said = run(tmp_path, 2, how, 0)
    assert codes == [KILLED, LOST]
    assert "rank 0 (127.0.0.1) is gone, or the network to it: rank 1" in sentence(said[1])
    assert "step 2, forward" in sentence(said[1])


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_rank_meets_is_said_by_all(tmp_path: Path, rank: int) -> None:
    codes, said = run(tmp_path, 2, "mistake", rank)
    assert codes == [FAILED, FAILED]
    assert said[rank].endswith("train.py: frame 7 of scene0001_00 cannot be read; replace the file.\n")
    expected = f"rank {rank} ({HOST}) stopped at step 2, forward, {MODULE}: frame 7 of scene0001_00 cannot be read"
    assert expected in sentence(said[1 - rank]) and "exit code 1" in sentence(said[1 - rank])
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.distributed
def test_another_failure_is_lost(tmp_path: Path) -> None:
    codes, said = run(tmp_path, 2, "failure", 1)
    assert codes == [LOST, LOST]
    assert sentence(said[0]) == sentence(said[1])
    assert f"rank 1 ({HOST}) failed at step 2, forward, {MODULE}: RuntimeError('out of memory')" in sentence(said[0])
    assert "Traceback" in said[1] and "in failure" in said[1]


@pytest.mark.distributed
def test_what_all_ranks_raise_goes_its_way(tmp_path: Path) -> None:
    codes, said = run(tmp_path / "both", 2, "mistake", -1)
    assert codes == [FAILED, FAILED]
    assert all("watchdog" not in each and each.endswith("replace the file.\n") for each in said)
    codes, said = run(tmp_path / "none", 2, "sleep", 5)
    assert codes == [0, 0]
    assert all("watchdog" not in each and each.endswith("through\n") for each in said)


@pytest.mark.distributed
def test_one_rank_alone_is_watched_too(tmp_path: Path) -> None:
    started = time.monotonic()
    codes, said = run(tmp_path, 1, "sleep", 0)
    assert codes == [LOST] and f"rank 0 ({HOST}) hangs" in sentence(said[0])
    assert time.monotonic() - started < 60


def seen(judge: Judge, states: list[State], seconds: float, step: float = 2.0, quiet: tuple[int, ...] = ()) -> Verdict:
    """The verdict of a judge that looks every two seconds for a while; it must come."""
    verdict, now = None, 0.0
    while now <= seconds and verdict is None:
        states = [replace(each, beat=each.beat + (r not in quiet)) for r, each in enumerate(states)]
        verdict, now = judge.look(states, now), now + step
    assert verdict is not None
    return verdict


RUNS = State(1, "a", 3, "forward", "m", 0.0, True)


def test_a_judge_that_could_not_look_blames_nobody() -> None:
    """A machine that was suspended, or a main thread that held Python's lock for long."""
    judge = Judge(LIMITS, 2)
    assert judge.look([RUNS, RUNS], 0.0) is None
    for now in (1000.0, 2000.0, 3000.0):
        assert judge.look([RUNS, RUNS], now) is None  # 12 s at most have been counted


def test_standing_still_before_the_loop_is_no_hang() -> None:
    judge = Judge(LIMITS, 2)
    loading = replace(RUNS, looping=False, still=5000.0)
    assert judge.look([loading, loading], 0.0) is None
    assert judge.look([loading, replace(RUNS, still=599.0)], 2.0) is None
    verdict = judge.look([loading, replace(RUNS, still=600.0)], 4.0)
    assert verdict is not None and verdict.line.startswith("rank 1 (a) hangs")


def test_the_dead_rank_is_named_and_not_those_that_lost_it() -> None:
    lost = replace(RUNS, kind=FAILURE, words="RuntimeError('Connection closed by peer')")
    verdict = seen(Judge(LIMITS, 3), [lost, RUNS, lost], 20, quiet=(1,))
    assert verdict.code == LOST and verdict.line.startswith("rank 1 (a) is gone: not heard for ")
    assert verdict.table.count("Connection closed by peer") == 2


def test_a_mistake_goes_before_everything_else() -> None:
    states = [replace(RUNS, still=900.0), replace(RUNS, kind=MISTAKE, words="no such file."), RUNS]
    verdict = seen(Judge(replace(LIMITS, hang=1000.0), 3), states, 20, quiet=(2,))
    assert (verdict.code, verdict.line) == (FAILED, "rank 1 (a) stopped at step 3, forward, m: no such file.")


def test_ranks_that_have_all_left_are_let_go() -> None:
    judge = Judge(LIMITS, 3)
    states = [replace(RUNS, kind=kind) for kind in (LEFT, MISTAKE, FAILURE)]
    assert [judge.look(states, 2.0 * i) for i in range(50)] == [None] * 50


def test_modules_are_followed_down_to_the_blocks() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})

    names = [name for name, _ in blocks("model.vlm", Wrapped())]
    assert "model.vlm.layers.0" in names and "model.vlm.layers.0.0" not in names
    tower, activity = nn.Sequential(nn.Linear(2, 2)), Activity()
    before = activity.moved
    activity.follow("tower", tower)
    tower(torch.ones(1, 2))
    assert activity.module == "tower.0" and activity.moved > before
