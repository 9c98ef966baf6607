"""Evaluation in one, two and three processes, killed and resumed: all write the same bytes.

The ranks are forked, or started by torchrun; ``deepspeed`` as the launcher is a nightly test here (`train_once`
of tests/helpers/runs.py starts a training run with it).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fork_server import ROOT, Rank, environment, start_ranks
from runs import TIMEOUT, launch, run_ranks
from w2r2_ds.commands import evaluate
from w2r2_ds.training.deepspeed.process_group import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SAMPLES = 8
NAME = "predictions-scanrefer-fused.jsonl"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def arguments(run: Path, out: Path) -> list[str]:
    options = {"checkpoint": run, "out": out, "batch_size": 1, "limit": SAMPLES, "max_new_tokens": 60}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def torchrun(ranks: int, script: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script with torchrun; `launch` uses ``deepspeed``."""
    command = [*TORCHRUN, "--nproc_per_node", str(ranks), script, *words]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=ROOT, env=environment(), text=True, timeout=TIMEOUT, check=False, **out)


def kill_at(ranks: list[Rank], parts: Path, lines: int) -> int:
    """Kill all ranks (SIGKILL) when at least `lines` answers are saved; returns the number of saved answers."""
    deadline = time.monotonic() + 300
    while (found := count(parts)) < lines:
        assert not any(rank.poll() is not None for rank in ranks), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for each in ranks:
        os.kill(each.pid, signal.SIGKILL)
    for each in ranks:
        each.end()
    return found


def scores_in(stdout: str) -> Any:
    """The scores in the standard output, on which DeepSpeed and its launcher write too."""
    return json.JSONDecoder().raw_decode(stdout[stdout.index("{\n") :])[0]


def count(parts: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in parts.glob("part-*.jsonl"))


def work(folder: Path) -> None:
    """Run the evaluation in a forked rank."""
    words = json.loads((folder / "arguments.json").read_text())
    sys.exit(evaluate.main(words))


def output_folder(run: Path, out: Path) -> Path:
    """Create the output folder with the command line of the forked ranks."""
    out.mkdir()
    (out / "arguments.json").write_text(json.dumps(arguments(run, out)))
    return out


@pytest.mark.parametrize("launcher", [torchrun, pytest.param(launch, marks=pytest.mark.nightly)])
def test_predictions_do_not_depend_on_ranks_or_a_kill(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], launcher: Any
) -> None:
    assert evaluate.main(arguments(trained, tmp_path / "one")) == 0
    stdout, stderr = capfd.readouterr()
    expected = (tmp_path / "one" / NAME).read_bytes()
    assert len(expected.splitlines()) == SAMPLES
    # Standard output has the scores only, so that it can be piped.
    assert json.loads(stdout) == json.loads((tmp_path / "one" / "scores-scanrefer-fused.json").read_text())
    assert f"answers (fused): {SAMPLES} of {SAMPLES}" in stderr

    two = output_folder(trained, tmp_path / "two")
    ranks = start_ranks(2, Path(__file__), two, free_port())
    parts = tmp_path / "two" / "parts-scanrefer-fused"
    kill_at(ranks, parts, 3)
    assert not (tmp_path / "two" / NAME).exists()
    torn = max(parts.glob("part-*.jsonl"), key=lambda file: file.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-40])  # as after a kill within a line
    kept = {file.name: file.read_bytes() for file in parts.glob("part-*.jsonl")}
    remaining = SAMPLES - count(parts)
    done = launcher(2, "launchers/evaluate.py", arguments(trained, tmp_path / "two"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "two" / NAME).read_bytes() == expected
    assert scores_in(done.stdout) == json.loads((tmp_path / "two" / "scores-scanrefer-fused.json").read_text())
    assert 0 < remaining < SAMPLES and kept and not parts.exists()
    own = len(range(0, SAMPLES, 2)) - kept.get("part-0000.jsonl", b"").count(b"\n")
    assert own == 0 or f"rank 0 of 2: {own} of {own}" in done.stdout, "saved answers are not generated again"

    folder = output_folder(trained, tmp_path / "three")
    run_ranks(3, Path(__file__), folder)
    assert (folder / NAME).read_bytes() == expected
