"""Ranks that start at once: one process imports everything and forks them, instead of a launcher that starts each anew.

The `deepspeed` program imports DeepSpeed twice, 3 s each, before the first rank begins, and a rank spends 10 s of
processor time on imports. Runs whose start is not what a test is about leave that out (`fork_ranks`); ``python
tests/forked.py`` is the process that forks.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARM = (
    "launchers.train",
    "launchers.evaluate",
    "deepspeed",
    "peft",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "w2r2_ds.engine.loop",
    "w2r2_ds.evaluation.in_training",
)
"""What the ranks would import one by one."""
POLL = 0.02
"""Seconds between two looks at the ranks."""


def fork_ranks(ranks: int, program: Path, folder: Path, port: int, timeout: float) -> int:
    """Call ``work(folder)`` of the Python file `program` on so many ranks; all they print goes to folder/output.txt.

    Returns:
        0, or what the first rank that failed exited with, negative for a signal; the others are then killed, as
        DeepSpeed's launcher does. After `timeout` seconds all are killed: -9.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    try:
        request = [ranks, str(program), str(folder), port, timeout]
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
    except BaseException:  # a test that ran into its time limit leaves no ranks behind
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        _server.cache_clear()
        raise
    assert answer, "the process that forks ranks has died; its error is on the standard error stream"
    return int(answer)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Started by the first test that needs it; ends with the process that runs the tests, whose pipe then closes."""
    command = [sys.executable, "-u", __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), text=True, start_new_session=True, stdin=pipe, stdout=pipe)


def environment() -> dict[str, str]:
    """For a child process: one thread, offline, the repository importable."""
    extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # The launcher looks for its helpers beside the interpreter that runs the tests.
    return os.environ | extra | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def serve() -> None:
    """Answer each request, a line of JSON, with the exit status of its ranks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for module in WARM:
        importlib.import_module(module)
    importlib.import_module("torch").set_printoptions(threshold=0, edgeitems=1)  # DeepSpeed formats tensors for no one
    gc.freeze()
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    threads = [name for name in threads if name != "jemalloc_bg_thd"]  # PyArrow's, which is made for forks
    assert len(threads) == 1, f"{threads}: a fork would lose all threads but one"
    for line in sys.stdin:
        print(_fork_all(*json.loads(line)), file=answers, flush=True)


def _fork_all(ranks: int, program: str, folder: str, port: int, timeout: float) -> int:
    deadline, parent = time.monotonic() + timeout, os.getppid()
    alive = {_fork(rank, ranks, Path(program), Path(folder), port) for rank in range(ranks)}
    failed = 0
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            alive.discard(pid)
            failed = failed or os.waitstatus_to_exitcode(status)
        if failed or time.monotonic() > deadline or os.getppid() != parent:  # or killed with the tests
            failed = failed or -signal.SIGKILL
            for each in alive:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            break
        if not pid:
            time.sleep(POLL)
    return failed


def _fork(rank: int, ranks: int, program: Path, folder: Path, port: int) -> int:
    """Its process id. The child never returns: it ends as a program does, with its traceback if it has one."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (own | where).items()})
    sys.path.insert(0, str(program.parent))
    importlib.import_module(program.stem).work(folder)
    sys.exit(0)


if __name__ == "__main__":
    serve()
