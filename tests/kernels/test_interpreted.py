"""The kernels' numbers without a GPU: the tests of interpreted/, in a process with Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS = "test_step_equivalence.py"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        pytest.param(["--ignore", str(HERE / "interpreted" / STEPS)], 21, id="kernels"),
        pytest.param([STEPS, "-m", "not nightly"], 5, id="steps"),
        pytest.param([STEPS, "-m", "nightly"], 6, id="steps of all fusions", marks=pytest.mark.nightly),
    ],
)
def test_interpreted_tests_pass(arguments: list[str], least: int) -> None:
    """At least `least` tests must pass: with a wrong path pytest would collect none."""
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
        *arguments,
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE / "interpreted", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-2000:]
