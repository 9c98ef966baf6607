"""Fork server for ranks: one process imports everything and forks them, so that starting a rank takes no import time.

The `deepspeed` program imports DeepSpeed twice, 3 s each, before the first rank begins, and a rank spends 10 s of
processor time on imports. Runs whose start is not what a test is about leave that out (`fork_rank`, `fork_ranks`);
``python tests/helpers/fork_server.py`` is the process that forks. It ends, with all that it forked, when the tests'
process does.
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
    "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}{os.pathsep}{HELPERS / 'fast_start'}",
    # An optimizer of DeepSpeed that is not used would import torch's compiler into every rank, 1.2 s.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of every child process: one thread, offline, the repository importable, a quick start."""
POLL = 0.02
"""Seconds between two polls of the ranks."""


class Rank:
    """A forked process, in a session of its own.

    Args:
        pid: its process id, which no other process gets before `poll` has reaped it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = _ask("poll", self.pid)
        return self.code

    def send(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """SIGKILL to it and to all that it started, if they still run."""
        while True:
            with contextlib.suppress(ProcessLookupError):  # gone with all its children, or no session yet
                os.killpg(self.pid, signal.SIGKILL)
            if self.poll() is not None:
                break
            time.sleep(POLL)


def fork_rank(program: Path, function: str, arguments: list[Any], variables: Mapping[str, str], log: Path) -> Rank:
    """Call a function of a Python file in a process of its own.

    Args:
        program: the file; its folder is importable.
        function: its name.
        arguments: of the function; JSON.
        variables: of the environment, besides `environment`.
        log: gets both output streams, after what it has.
    """
    return Rank(_ask("fork", str(program), function, arguments, dict(variables), str(log)))


def fork_ranks(ranks: int, program: Path, folder: Path, port: int, timeout: float) -> int:
    """Call ``work(folder)`` of the Python file `program` on so many ranks; all they print goes to folder/output.txt.

    Returns:
        0, or what the first rank that failed exited with, negative for a signal; the others are then killed, as
        DeepSpeed's launcher does. After `timeout` seconds all are killed: -9.
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
    finally:  # also where a test ran into its time limit
        for rank in alive:
            rank.end()


def start_ranks(ranks: int, program: Path, folder: Path, port: int) -> list[Rank]:
    """As `fork_ranks`, and wait for nothing."""
    given, output = [str(program), str(folder)], folder / "output.txt"
    return [fork_rank(Path(__file__), "work", given, place(rank, ranks, port), output) for rank in range(ranks)]


def place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables by which ranks of one machine find each other."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def work(program: str, folder: str) -> None:
    """Process of a rank of `fork_ranks`."""
    sys.path.insert(0, str(Path(program).parent))
    importlib.import_module(Path(program).stem).work(Path(folder))


def script(path: str, words: list[str]) -> None:
    """Run a script as ``python path words...`` does, for `fork_rank`."""
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def environment() -> dict[str, str]:
    """For a child process: `VARIABLES`, and the programs of this interpreter."""
    # The launcher finds its helpers beside the interpreter that runs the tests.
    return os.environ | VARIABLES | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Started by the first test that needs it."""
    command = [sys.executable, "-u", __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, start_new_session=True, stdin=pipe, stdout=pipe
    )


def _ask(*request: object) -> Any:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    try:
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the process that forks ranks has died; its error is on the standard error stream"
    except BaseException:  # a test's time limit between question and answer: the next test starts another server
        _server.cache_clear()
        server.stdin.close()
        server.wait(60)
        raise
    return json.loads(answer)


def serve() -> None:
    """Answer each request, a line of JSON, until there are no more; then end what was forked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    gc.disable()  # imports make little garbage, and looking for it is a quarter of their time
    for module in WARM:
        importlib.import_module(module)
    importlib.import_module("torch").set_printoptions(threshold=0, edgeitems=1)  # DeepSpeed formats tensors for no one
    gc.freeze()
    gc.enable()
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # PyArrow's, which is made for forks
    assert len(threads) == 1, f"{threads}: a fork would lose all threads but one"
    alive: set[int] = set()
    try:
        for line in sys.stdin:
            kind, *arguments = json.loads(line)
            answer = _fork(alive, *arguments) if kind == "fork" else _exit_code(alive, *arguments)
            print(json.dumps(answer), file=answers, flush=True)
    finally:  # also when the tests' process was killed; a forked one has none of its own
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
    """Its process id. The child never returns: it ends as a program does, with its traceback if it has one."""
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
