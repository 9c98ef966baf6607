"""Real processes (torchrun, deepspeed, forked, alone): any number of ranks, killed or not, predict the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from jsonargparse import auto_cli

from launchers import evaluate
from runs import ROOT, environment, launch, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SAMPLES = 8
NAME = "predictions-scanrefer-fused.jsonl"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def arguments(run: Path, out: Path) -> list[str]:
    options = {"checkpoint": run, "out": out, "batch_size": 1, "limit": SAMPLES, "max_new_tokens": 60}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def start(command: list[str], run: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "launchers/evaluate.py", *arguments(run, out)],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_at(process: subprocess.Popen[str], parts: Path, lines: int) -> int:
    """SIGKILL to the launcher and all its ranks when so many answers are there; returns how many that were."""
    deadline = time.monotonic() + 300
    while (found := count(parts)) < lines:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.01)
    # The launcher gives its ranks sessions of their own, so they are looked up before any of them dies.
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in reversed(family):
        each.kill()
    process.communicate()
    psutil.wait_procs(family)
    return found


def scores_in(stdout: str) -> Any:
    """The scores; DeepSpeed and its launcher write on the same stream."""
    return json.JSONDecoder().raw_decode(stdout[stdout.index("{\n") :])[0]


def count(parts: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in parts.glob("part-*.jsonl"))


def work(folder: Path) -> None:
    """What each of the forked ranks does."""
    words = json.loads((folder / "arguments.json").read_text())
    auto_cli(evaluate.main, args=evaluate.gather_protocols(words), as_positional=False)


def test_one_two_and_three_ranks_and_a_killed_run_agree(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    auto_cli(evaluate.main, args=arguments(trained, tmp_path / "one"), as_positional=False)
    stdout, stderr = capfd.readouterr()
    expected = (tmp_path / "one" / NAME).read_bytes()
    assert len(expected.splitlines()) == SAMPLES
    assert scores_in(stdout) == json.loads((tmp_path / "one" / "scores-scanrefer-fused.json").read_text())
    assert f"answers (fused): {SAMPLES} of {SAMPLES}" in stderr

    process = start(TORCHRUN, trained, tmp_path / "two")
    parts = tmp_path / "two" / "parts-scanrefer-fused"
    kill_at(process, parts, 3)
    assert not (tmp_path / "two" / NAME).exists()
    torn = max(parts.glob("part-*.jsonl"), key=lambda file: file.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-40])  # as if killed within a line
    kept = {file.name: file.read_bytes() for file in parts.glob("part-*.jsonl")}
    left = SAMPLES - count(parts)
    done = launch(2, "launchers/evaluate.py", arguments(trained, tmp_path / "two"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "two" / NAME).read_bytes() == expected
    assert scores_in(done.stdout) == json.loads((tmp_path / "two" / "scores-scanrefer-fused.json").read_text())
    assert 0 < left < SAMPLES and kept and not parts.exists()
    own = len(range(0, SAMPLES, 2)) - kept.get("part-0000.jsonl", b"").count(b"\n")
    assert own == 0 or f"rank 0 of 2: {own} of {own}" in done.stdout, "what was finished is not answered again"

    folder = tmp_path / "three"
    folder.mkdir()
    (folder / "arguments.json").write_text(json.dumps(arguments(trained, folder)))
    run_ranks(3, Path(__file__), folder)
    assert (folder / NAME).read_bytes() == expected
