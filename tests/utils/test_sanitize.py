"""A program whose log cannot be written goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runs import environment

PROGRAM = """
import resource, sys
from w2r2_ds.utils.sanitize import keep_going
{call}
print("before", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))  # EFBIG; Python ignores SIGXFSZ
print("a warning that is longer than the limit", flush=True)
print("another", file=sys.stderr, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
open(sys.argv[1], "w").write("reached")
"""


def run(folder: Path, call: str) -> int:
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-c", PROGRAM.format(call=call), str(folder / "end")]
        return subprocess.run(command, stdout=log, stderr=log, env=environment(), check=False).returncode


def test_a_log_that_is_full_ends_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "keep_going()") == 0
    assert (tmp_path / "end").read_text() == "reached"
    assert (tmp_path / "log").read_text().startswith("before\n")


def test_without_it_the_program_ends(tmp_path: Path) -> None:
    assert run(tmp_path, "") != 0
    assert not (tmp_path / "end").exists()
