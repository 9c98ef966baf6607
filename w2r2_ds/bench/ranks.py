"""Run a module in several processes with torchrun, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_ranks(module: str, ranks: int, *arguments: object) -> Any:
    """Run ``python -m module RESULT ARGUMENTS...`` in `ranks` processes; returns the JSON that rank 0 wrote to RESULT.

    Raises:
        RuntimeError: a rank failed; the message has the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [*torchrun, "-m", module, str(result), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise RuntimeError(f"a rank failed:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())
