"""Processes that a benchmark starts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2r2_ds.bench.ranks import run_process

CHILD = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); "


def test_a_process_that_exceeds_its_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    code = CHILD + f"open({str(written)!r}, 'w').write(str(child.pid)); child.wait()"
    with pytest.raises(RuntimeError):
        run_process([sys.executable, "-c", code], 3.0)
    # The killed process may be a zombie until the first process of the machine has waited for it.
    deadline = time.monotonic() + 10
    while is_running(int(written.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(written.read_text()))


def test_outputs_and_exit_code_are_returned(tmp_path: Path) -> None:
    done = run_process(
        [sys.executable, "-c", "import os, sys; print(os.getcwd()); print('e', file=sys.stderr); sys.exit(3)"],
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path}\n", "e\n")


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")
