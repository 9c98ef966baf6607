"""Run a module in several processes with torchrun, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_ranks(module: str, ranks: int, *arguments: object, seconds: float | None = None) -> Any:
    """Run ``python -m module RESULT ARGUMENTS...`` in `ranks` processes; returns the JSON that rank 0 wrote to RESULT.

    Args:
        module: name of the module.
        ranks: number of processes.
        arguments: its further arguments.
        seconds: time limit; None for none.

    Raises:
        RuntimeError: a rank failed (the message has the end of its error output), or the time limit was reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = run_process([*torchrun, "-m", module, str(result), *map(str, arguments)], seconds, env=environment)
        if done.returncode:
            raise RuntimeError(f"a rank failed:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def run_process(
    command: Sequence[str],
    seconds: float | None = None,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a program that starts processes of its own, which do not outlive this call.

    Raises:
        RuntimeError: the program was still running after `seconds`.
    """
    # With a session of its own, the process group contains all processes that the program starts.
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # also Ctrl-C, which reaches this session only
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"not finished within {seconds:.0f} s (--seconds)") from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
