"""Signals to real runs: all ranks stop at the same step after one checkpoint, and a resumed run is bit-equal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fork_server import HELPERS
from rank_processes import Ranks
from runs import ZERO3, World, read_metrics
from w2r2_ds.training.fault_tolerance import exit_codes
from w2r2_ds.training.fault_tolerance.signals import CODES, StopSignals

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

STEPS = 8
EXACT = ("step", "loss", "align", "det", "push", "s_short", "s_fused", "grad_norm", "lr", "merger_lr")
SCRIPT = str(HELPERS / "ranks" / "stopped_runs.py")


def arguments(world: World, out: Path) -> list[str]:
    """Eight steps with dropout, two micro-batches per step and rank, one DataLoader worker per rank; one save."""
    changes: dict[str, object] = {
        "train__steps": STEPS,
        "train__micro_batch": 2,
        "train__save_every": 1000,
        "model__lora_dropout": 0.1,
        "data__workers": 1,
        "resume": "auto",
    }
    return ["--deepspeed", str(ZERO3), *world.arguments(out, **changes)]


def exact(run: Path) -> list[list[Any]]:
    return [[line[name] for name in EXACT] for line in read_metrics(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], Path, int]:
    """A run of two ranks that is stopped by signals: exit codes, run folder and number of steps.

    One SIGUSR1 to rank 1, then repeated ones to both ranks and their DataLoader workers.
    """
    folder = tmp_path_factory.mktemp("stopped")
    run = folder / "run"
    with Ranks(2, ["launchers/train.py", *arguments(world, run)], folder) as ranks:
        ranks.wait_until(lambda: lines(run) >= 2)
        family = [psutil.Process(process.pid) for process in ranks.processes]
        workers = [child for parent in family for child in parent.children(recursive=True)]
        assert len(workers) >= 2
        ranks.send(1, signal.SIGUSR1)
        ranks.wait_until(lambda: any((run / "checkpoints").glob("step-*")))  # the save has begun
        deadline = time.monotonic() + 60
        while any(process.poll() is None for process in ranks.processes) and time.monotonic() < deadline:
            for process in [*family, *workers]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                        process.send_signal(signal.SIGUSR1)
                        if process in workers:
                            process.send_signal(signal.SIGTERM)
            time.sleep(0.005)
        return ranks.codes(120), run, lines(run)


@pytest.fixture(scope="module")
def after(world: World, stopped: tuple[list[int], Path, int], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In one launch: an undisturbed run; the stopped run, resumed and stopped by SIGTERM; and resumed again.

    Returns the codes of each rank, and the folder of the undisturbed run.
    """
    folder = tmp_path_factory.mktemp("after")
    _, run, done = stopped
    jobs = [
        [arguments(world, folder / "whole"), -1, 0, "SIGUSR1"],
        [arguments(world, run), 0, done + 1, "SIGTERM"],
        [arguments(world, run), -1, 0, "SIGUSR1"],
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    with Ranks(2, [SCRIPT, str(file)], folder) as ranks:
        assert ranks.codes(600) == [0, 0], ranks.output(0)[-4000:] + ranks.output(1)[-4000:]
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2)], folder / "whole"


def test_a_signal_to_one_rank_stops_both_after_one_checkpoint(stopped: tuple[list[int], Path, int]) -> None:
    codes, run, done = stopped
    assert codes == [exit_codes.REQUEUE, exit_codes.REQUEUE]
    assert 2 <= done < STEPS
    assert checkpoints(run)[0] == f"step-{done:06d}"
    assert [line["step"] for line in read_metrics(run)][:done] == list(range(1, done + 1))


def test_sigterm_stops_with_the_exit_code_without_requeue(after: Any, stopped: tuple[list[int], Path, int]) -> None:
    (first, second), _ = after
    _, run, done = stopped
    assert first == second
    assert [code for code, _ in first] == [exit_codes.DONE, exit_codes.TERMINATED, exit_codes.DONE]
    assert first[1][1] == str(run / "checkpoints" / f"step-{done + 2:06d}")  # after the step in which it came


def test_a_run_stopped_twice_equals_an_uninterrupted_run(after: Any, stopped: tuple[list[int], Path, int]) -> None:
    _, whole = after
    _, run, _ = stopped
    assert len(exact(whole)) == STEPS
    assert exact(run) == exact(whole)
    assert checkpoints(run)[-1] == checkpoints(whole)[-1] == f"step-{STEPS:06d}"


def test_a_signal_during_set_up_writes_no_checkpoint(world: World, tmp_path: Path) -> None:
    """One rank without a launcher, signalled as soon as its handlers are installed, long before the first step."""
    run = tmp_path / "run"
    with Ranks(1, ["launchers/train.py", *arguments(world, run)], tmp_path) as ranks:
        ranks.wait_until(lambda: catches(ranks.processes[0].pid, signal.SIGTERM))
        ranks.send(0, signal.SIGTERM)
        ranks.send(0, signal.SIGUSR1)  # SIGTERM takes precedence in any order
        assert ranks.codes(300) == [exit_codes.TERMINATED], ranks.output(0)[-4000:]
    assert lines(run) == 0 and not checkpoints(run)
    assert "no checkpoint was written" in ranks.output(0) and "Traceback" not in ranks.output(0)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.fixture
def restored() -> Iterator[None]:
    """Restore the handlers of the signals after the test."""
    before = {number: signal.getsignal(number) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_set_the_code_inside_the_block_and_ignored_after_it(restored: None) -> None:
    with StopSignals() as signals:
        assert signals.agreed() == exit_codes.DONE
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.agreed() == exit_codes.TERMINATED
    signal.raise_signal(signal.SIGUSR1)


def test_an_interrupt_sets_the_code_of_sigterm(restored: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "w2r2_ds"), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.agreed() == exit_codes.TERMINATED
        deadline = time.monotonic() + 30
        while "Ctrl-C" not in caplog.text and time.monotonic() < deadline:  # logged by a thread
            time.sleep(0.01)
    assert "Ctrl-C" in caplog.text
    signal.raise_signal(signal.SIGINT)


@pytest.mark.timeout(60)
def test_the_end_of_the_block_does_not_wait_for_forked_processes(restored: None) -> None:
    """A worker of a data loader has the socket of the thread, too."""
    with StopSignals():
        child = os.fork()
        if child == 0:
            time.sleep(300)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_no_thread_is_left_after_the_block(restored: None) -> None:
    """It has a reference to a process group of gloo, which must be freed before Python exits."""
    with StopSignals() as signals:
        assert signals._thread.is_alive()
    assert not signals._thread.is_alive()
