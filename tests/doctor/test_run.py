"""The doctor in real processes: two ranks that are two nodes, well and with faults, and alone from nothing."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from broken_rank import command
from fork_server import HELPERS
from runs import ROOT, environment
from w2r2_ds.training.deepspeed.launch import free_port

pytestmark = pytest.mark.distributed

RANK = HELPERS / "broken_rank.py"
MINUTE = 60
START = 120  # of Python with torch, on a busy machine


@dataclass
class Node:
    """One rank, a node of its own.

    Attributes:
        fault: of broken_rank.py.
        changes: options of its command line that are its own.
        environment: variables of its own.
        files: most files that it may open, 0 for as many as this process.
    """

    fault: str = "none"
    changes: dict[str, str] | None = None
    environment: dict[str, str] | None = None
    files: int = 0


class Launch:
    """Ranks as slurm/rank.sh starts them; those that are None never come."""

    def __init__(self, folder: Path, options: dict[str, str], nodes: list[Node | None]) -> None:
        self.folder, self.started = folder, time.monotonic()
        folder.mkdir(parents=True)
        port = str(free_port())
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        for rank, node in enumerate(nodes):
            if node is None:
                continue
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "SLURMD_NODENAME": f"n{rank + 1}",
                "XDG_CACHE_HOME": str(folder / "cache"),
            }

            def limit(files: int = node.files) -> None:
                if files:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

            self.ranks[rank] = subprocess.Popen(
                [sys.executable, str(RANK), node.fault, *command(options | (node.changes or {}))],
                cwd=ROOT,
                env=environment() | place | (node.environment or {}),
                stdout=(folder / f"{rank}.txt").open("wb"),
                stderr=subprocess.STDOUT,
                preexec_fn=limit,
            )

    def end(self, rank: int, more: float = 0) -> tuple[int, str]:
        """Exit status and output of a rank, which has to end within the minute, or so many seconds later."""
        code = self.ranks[rank].wait(max(1, self.started + START + MINUTE + more - time.monotonic()))
        return code, (self.folder / f"{rank}.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


def test_two_well_nodes(folder: Path, little_run: dict[str, str]) -> None:
    """Nothing is wrong, every check was done on both nodes, and nothing is left behind."""
    launch = Launch(folder / "well", little_run, [Node(), Node()])
    code, output = launch.end(0)
    assert code == 0, output
    assert launch.end(1) == (0, ""), "rank 0 alone prints"
    assert "doctor: nothing is wrong." in output and "WRONG" not in output
    for check in ("versions", "code", "limits", "TMPDIR", "extensions", "locks", "out", "data", "weights", "imports"):
        assert re.search(rf"{check} +│ fine on 2 nodes", output), check
    for check in ("settings", "clock", "shared out"):
        assert re.search(rf"{check} +│ fine", output), check
    assert re.search(r"all-reduce +│ 16 MiB in [\d.]+ ms, [\d.]+ GB/s", output)
    assert "stage 3" in output and "float32 (model.dtype auto)" in output and "sdpa" in output
    assert not list(Path(little_run["out"]).parent.glob(".doctor*")), "its probes are gone"


def test_each_fault_of_a_node_is_named(folder: Path, little_run: dict[str, str]) -> None:
    """A second node with another clock, packages, data, folder, limits, and the lock of a killed build."""
    sick = folder / "n2"
    for name, found in (("safetensors", "0.7.1"), ("peft", "0.20.0")):
        info = sick / "packages" / f"{name}-{found}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    (sick / "packages" / "embreex").mkdir()
    (sick / "packages" / "embreex" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    lock = sick / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    node = Node(
        fault="clock",
        changes={"data.root": str(sick / "nowhere"), "out": str(sick / "run"), "model.vggt": little_run["model.vlm"]},
        environment={
            "PYTHONPATH": f"{ROOT}:{sick / 'packages'}",
            "TORCH_EXTENSIONS_DIR": str(lock.parents[2]),
            "NCCL_SOCKET_IFNAME": "ib0",
        },
        files=200,
    )
    launch = Launch(
        folder / "sick", little_run, [Node(environment={"NCCL_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)}), node]
    )
    code, output = launch.end(0)
    assert code == 1 and launch.end(1)[0] == 1
    wrong = [line for line in output.splitlines() if line.startswith("WRONG: ")]
    for sentence in (
        r"n2: the clock is (29|30)\.\d s ahead of that of n1 ",
        r"n2: safetensors is 0\.7\.1 here, but 0\.8\.\d+ on n1",
        r"n2: peft is 0\.20\.0, but this code is written for ",
        r"n2: embreex is installed but cannot be imported \(ImportError: undefined symbol",
        r"n2: .*nowhere/prepared holds no prepared data set",
        rf"n2: {lock} is the lock of a build that was killed",
        r"n2: a process may hold 200 open files",
        r"n2: NCCL_SOCKET_IFNAME is ib0 here, but eth0 on n1",
    ):
        assert any(re.match(f"WRONG: {sentence}", line) for line in wrong), (sentence, output)
    assert not [line for line in wrong if not line.startswith("WRONG: n2: ")], "nothing is said of the well node"
    assert re.search(r"doctor: \d+ wrong, on n2\.", output)


def test_a_rank_that_freezes_in_the_all_reduce_is_named(folder: Path, little_run: dict[str, str]) -> None:
    launch = Launch(folder / "frozen", little_run, [Node(fault="haste"), Node(fault="freeze")])
    try:
        code, output = launch.end(0)
    finally:
        launch.ranks[1].kill()
    assert code == 1
    assert "WRONG: n2: rank 1 came, but is not through, the last known of it is: doing an all-reduce" in output
    assert "WRONG: n1: the all-reduce over gloo failed here" in output


def test_wrong_sum_through_torchrun(little_run: dict[str, str], folder: Path) -> None:
    """torchrun keeps the store itself; both ranks are on one node, and the sum of rank 1 is wrong."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(RANK), "sum"]
    done = subprocess.run(
        [*run, *command(little_run)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START + MINUTE,
    )
    assert done.returncode == 1
    assert "an all-reduce over gloo gives wrong sums here (1 of 4194304 numbers, 4.0 instead of 3.0)" in done.stdout


def test_alone_from_nothing(tmp_path: Path) -> None:
    """Without options it looks at the machine alone, from whatever folder; here only at libraries and limits."""
    bare = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    launcher = ROOT / "launchers" / "doctor.py"
    done = subprocess.run(
        [sys.executable, str(launcher)],
        cwd=tmp_path,
        env=bare | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START + MINUTE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "doctor: nothing is wrong." in done.stdout and "weights" not in done.stdout and "out " not in done.stdout


@pytest.mark.parametrize("patience", [2, pytest.param(280, marks=pytest.mark.nightly)])
def test_a_node_that_does_not_come_is_named(folder: Path, little_run: dict[str, str], patience: int) -> None:
    """By the name that Slurm gives it; the doctor's own 280 s are waited for at night."""
    scontrol = folder / f"bin{patience}" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{scontrol.parent}:{environment()['PATH']}"}
    first = Node(fault="none" if patience == 280 else "impatience", environment=slurm)
    launch = Launch(folder / f"missing{patience}", little_run, [first, None])
    code, output = launch.end(0, patience)
    assert code == 1
    assert f"WRONG: n2: rank 1 did not come within {patience} s (there are n1); look whether the node is up" in output
    assert "all-reduce" not in output, "it would hang"


def test_rank_0_that_does_not_come_is_named(folder: Path, little_run: dict[str, str]) -> None:
    code, output = Launch(folder / "headless", little_run, [None, Node(fault="impatience")]).end(1)
    assert code == 1
    assert "WRONG: n2: rank 0 cannot be reached at 127.0.0.1, port " in output


def test_a_rank_that_loses_rank_0_reports_what_it_found(folder: Path, little_run: dict[str, str]) -> None:
    """Its own checks go on, and their findings are not lost behind a traceback."""
    changes = {"data.root": str(folder / "nowhere")}
    launch = Launch(folder / "vanished", little_run, [Node(fault="vanish"), Node(changes=changes)])
    code, output = launch.end(1)
    assert code == 1 and "Traceback" not in output
    assert "WRONG: n2: rank 0 has stopped (" in output
    assert "nowhere/prepared holds no prepared data set" in output


def test_a_recipe_that_does_not_answer_ends_the_doctor(tmp_path: Path) -> None:
    """As one on a dead mount; the thread of C ends the process, and the stacks say where it was."""
    os.mkfifo(tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, str(RANK), "dead", "--config", str(tmp_path / "recipe.yaml")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:01)"), done.stdout + done.stderr
    assert "safe_yaml.py" in done.stderr and "launchers/doctor.py" in done.stderr
