"""Fork server for ranks: one process imports all packages once and forks the ranks, which then need no imports.

The `deepspeed` launcher imports DeepSpeed twice (3 s each), and each rank spends 10 s of CPU time on imports. Tests
that are not about the launcher avoid both with `fork_rank` and `fork_ranks`. The server process is
``python tests/helpers/fork_server.py``. It ends with the pytest process, and kills the ranks that still run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent
FOLDERS = (HELPERS, *(HELPERS / name for name in ("data", "evaluation", "models", "ranks", "fast_start")))
"""Folders of modules that tests and ranks import as top-level modules, as in `pythonpath` of pyproject.toml."""
WARM = (
    "w2r2_ds.commands.train",
    "w2r2_ds.commands.evaluate",
    "deepspeed",
    "peft",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by every engine
    "deepspeed.module_inject.auto_ep_layer",
    "torch.utils.cpp_extension",
    "pandas",
    "PIL.JpegImagePlugin",
    "w2r2_ds.training.trainer",
    "w2r2_ds.evaluation.runner",
    "w2r2_ds.evaluation.validator",
    "w2r2_ds.demo.assets",
)
"""Modules that are imported once, before ranks are forked."""
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *FOLDERS))),
    # DeepSpeed's Muon optimizer, which is not used, imports torch.compile in every rank (1.2 s).
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment of every child process: one thread, offline, the repository importable, few garbage collections."""
POLL = 0.02
"""Seconds between two polls of the ranks."""


class Rank:
    """A forked process in its own session.

    Args:
        pid: process id. It is not reused before `poll` has reaped the process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Exit code, -N if signal N killed the process; None while it runs."""
        if self.code is None:
            self.code = _request("poll", self.pid)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill the process and its child processes, and wait for its end."""
        while True:
            with contextlib.suppress(ProcessLookupError):  # all have ended, or setsid has not been called yet
                os.killpg(self.pid, signal.SIGKILL)
            if self.poll() is not None:
                break
            time.sleep(POLL)


def fork_rank(program: Path, function: str, arguments: list[Any], variables: Mapping[str, str], log: Path) -> Rank:
    """Call a function of a Python file in a forked process.

    Args:
        program: Python file; its folder is put on the path.
        function: name of the function.
        arguments: arguments of the function, as JSON values.
        variables: environment variables in addition to `environment`.
        log: file that standard output and error are appended to.
    """
    return Rank(_request("fork", str(program), function, arguments, dict(variables), str(log)))


def fork_ranks(ranks: int, program: Path, folder: Path, port: int, timeout: float) -> int:
    """Call ``work(folder)`` of the Python file `program` on forked ranks, with their output in folder/output.txt.

    Returns:
        0, or the exit code of the first rank that failed (-N for signal N). The other ranks are then killed, as by
        DeepSpeed's launcher. -9 if the ranks were killed after `timeout` seconds.
    """
    deadline, alive = time.monotonic() + timeout, start_ranks(ranks, program, folder, port)
    try:
        while alive:
            codes = [rank.poll() for rank in alive]
            if failed := next(filter(None, codes), 0):
                return failed
            if time.monotonic() > deadline:
                return -signal.SIGKILL
            alive = [rank for rank, code in zip(alive, codes, strict=True) if code is None]
            time.sleep(POLL)
        return 0
    finally:  # also if pytest's time limit interrupts the test
        for rank in alive:
            rank.end()


def start_ranks(ranks: int, program: Path, folder: Path, port: int) -> list[Rank]:
    """Fork the ranks of `fork_ranks` without waiting for them."""
    arguments, output = [str(program), str(folder)], folder / "output.txt"
    return [
        fork_rank(Path(__file__), "work", arguments, rank_variables(rank, ranks, port), output) for rank in range(ranks)
    ]


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Environment variables of `torch.distributed` for a rank on one machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def work(program: str, folder: str) -> None:
    """Entry point of a rank of `fork_ranks`."""
    sys.path.insert(0, str(Path(program).parent))
    importlib.import_module(Path(program).stem).work(Path(folder))


def script(path: str, arguments: list[str]) -> None:
    """Entry point for `fork_rank`: run a script as ``python path arguments...`` does."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def environment() -> dict[str, str]:
    """Environment of a child process: `VARIABLES`, and this interpreter's folder first on PATH.

    The `deepspeed` launcher calls programs from that folder.
    """
    return os.environ | VARIABLES | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The server process, started by the first test that needs it."""
    command = [sys.executable, "-u", __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, start_new_session=True, stdin=pipe, stdout=pipe
    )


def _request(*request: object) -> Any:
    """Send a request to the server as a line of JSON; returns the answer."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    try:
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the fork server has ended; its error is on standard error"
    except BaseException:  # e.g. pytest's time limit before the answer: the next test starts a new server
        _server.cache_clear()
        server.stdin.close()
        server.wait(60)
        raise
    return json.loads(answer)


def serve() -> None:
    """Main loop of the server: answer requests until standard input is closed, then kill the remaining ranks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error, so that standard output has answers only
    gc.disable()  # imports create little garbage, and collections take a quarter of their time
    for module in WARM:
        importlib.import_module(module)
    importlib.import_module("torch").set_printoptions(
        threshold=0, edgeitems=1
    )  # DeepSpeed formats tensors without printing them
    gc.freeze()
    gc.enable()
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # PyArrow's allocator, which is fork-safe
    assert len(threads) == 1, f"{threads}: a forked process has only the forking thread"
    alive: set[int] = set()
    try:
        for line in sys.stdin:
            kind, *arguments = json.loads(line)
            answer = _fork(alive, *arguments) if kind == "fork" else _exit_code(alive, *arguments)
            print(json.dumps(answer), file=answers, flush=True)
    finally:  # also when the pytest process was killed; empty in a forked process
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _exit_code(alive: set[int], pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    alive -= {found}
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(
    alive: set[int], program: str, function: str, arguments: list[Any], variables: dict[str, str], log: str
) -> int:
    """Fork a process that calls a function; returns its id. The child does not return: it exits as a program does."""
    pid = os.fork()
    if pid:
        alive.add(pid)
        return pid
    alive.clear()
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(variables)
    sys.path.insert(0, str(Path(program).parent))
    getattr(importlib.import_module(Path(program).stem), function)(*arguments)
    sys.exit(0)


if __name__ == "__main__":
    serve()
