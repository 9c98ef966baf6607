"""The kernels' numbers without a GPU: the tests of interpreted/, in a process in which Triton interprets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = 21
"""At least so many must have passed: a folder that is not found would pass none."""


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="kernels are not installed: pip install 'w2r2-ds[kernels]'")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / "interpreted"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= CASES, done.stdout[-2000:]
