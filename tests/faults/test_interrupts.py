"""Ctrl-C to the process group of a command, as a terminal sends it: one checkpoint, no traceback, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fork_server import ROOT, environment
from runs import ZERO3, World
from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.training.fault_tolerance.exit_codes import INTERRUPTED, TERMINATED

pytestmark = pytest.mark.timeout(1200)

BLOCKED = """
import ctypes, sys
from w2r2_ds.training.fault_tolerance.signals import StopSignals
with StopSignals() as signals:
    semaphore = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sem_init(semaphore, 0, 0)
    print("waiting", flush=True)
    ctypes.CDLL(None).sem_wait(semaphore)  # never returns; Python calls no signal handler meanwhile
"""


class Command:
    """A process in a process group of its own, with its output in a file."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def interrupt_when(self, condition: Callable[[], bool]) -> None:
        """Send Ctrl-C to the process group as soon as the condition holds."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)
        os.killpg(self.process.pid, signal.SIGINT)


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


def test_a_second_interrupt_ends_a_process_that_is_blocked_in_compiled_code(tmp_path: Path) -> None:
    with Command([sys.executable, "-c", BLOCKED], tmp_path / "log") as command:
        command.interrupt_when(lambda: "waiting" in command.log.read_text())
        time.sleep(0.2)  # two signals at the same time are one
        assert command.process.poll() is None
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.process.wait(30) == INTERRUPTED
    assert command.log.read_text() == "waiting\n"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_interrupt_of_a_launch_stops_all_ranks_after_one_checkpoint(
    launcher: str, world: World, tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", tmp_path / "logs"
    changes: dict[str, object] = {"train__steps": 500, "train__save_every": 1000, "data__workers": 1}
    script = ["launchers/train.py", "--deepspeed", str(ZERO3), *world.arguments(run, **changes)]
    port = f"--master_port={free_port()}"
    words = {
        "deepspeed": ["deepspeed", "--num_accelerators=2", port, f"--enable_each_rank_log={logs}", *script],
        "torchrun": ["torchrun", "--nproc_per_node=2", port, f"--log_dir={logs}", "--redirects=3", *script],
    }[launcher]
    with Command(words, tmp_path / "log") as command:
        command.interrupt_when(lambda: lines(run / "metrics.jsonl") >= 2)
        command.process.wait(120)
        wait_for_ranks(run)
        texts = [file.read_text() for file in logs.rglob("*") if file.is_file()]
        assert len(texts) >= 2
        assert not any("Traceback" in text for text in texts), texts
        assert sum(f"(exit code {TERMINATED})" in text for text in texts) == 1
        (checkpoint,) = (run / "checkpoints").glob("step-*")
        assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == lines(run / "metrics.jsonl")


def wait_for_ranks(run: Path) -> None:
    """DeepSpeed's launcher ends at once; the ranks then still save."""
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # the ranks print their last line


def test_an_interrupted_evaluation_continues(trained: Path, tmp_path: Path) -> None:
    """With loader workers, which get the signal too."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run)
    for file in run.rglob("config.yaml"):
        file.write_text(file.read_text().replace("workers: 0", "workers: 2"))
        assert "workers: 2" in file.read_text()
    words = [sys.executable, "launchers/evaluate.py", "--checkpoint", str(run), "--out", str(out), "--batch_size", "1"]
    answers = out / "parts-scanrefer-fused" / "part-0000.jsonl"
    with Command(words, tmp_path / "log") as command:
        command.interrupt_when(lambda: lines(answers) >= 1)
        assert command.process.wait(60) == INTERRUPTED
    text = command.log.read_text()
    assert text.count("w2r2 evaluate: ") == 1 and "Traceback" not in text, text
    before = answers.read_text()
    assert before.endswith("\n")
    with Command(words, tmp_path / "log") as command:
        assert command.process.wait(300) == 0
    assert (out / "predictions-scanrefer-fused.jsonl").read_text().startswith(before.splitlines()[0])


def test_an_interrupted_preparation_ends_with_one_line(tmp_path: Path) -> None:
    """While worker processes start, and while they work."""
    words = [sys.executable, "launchers/prepare.py", "synthetic", "--workers", "2", "--out", str(tmp_path / "data")]
    for stage in ("*", "*/posed_images/*"):
        with Command(words, tmp_path / "log") as command:
            command.interrupt_when(lambda stage=stage: bool(list(tmp_path.glob(f".data.partial-{stage}"))))  # type: ignore[misc]
            assert command.process.wait(60) == INTERRUPTED
        text = command.log.read_text()
        assert text.startswith("w2r2 prepare: ") and text.count("\n") == 1, text
        assert os.listdir(tmp_path) == ["log"]
