"""Whole runs of the doctor: two ranks as two nodes, with and without faults, and a single machine."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broken_rank import command
from fork_server import HELPERS
from runs import ROOT, environment
from w2r2_ds.training.deepspeed.process_group import free_port

pytestmark = pytest.mark.distributed

RANK = HELPERS / "ranks" / "broken_rank.py"
SECONDS = 240
"""Time limit of a launch on a busy machine."""


@dataclass
class Node:
    """One rank on its own node.

    Attributes:
        fault: fault of broken_rank.py.
        times: seconds to wait for other ranks, time-out of collectives in seconds.
        changes: options of this rank only.
        environment: environment variables of this rank only.
        files: limit of open files; 0 for the limit of this process.
    """

    fault: str = "none"
    times: tuple[int, int] = (120, 60)
    changes: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    files: int = 0


def start(folder: Path, options: dict[str, str], nodes: list[Node | None]) -> dict[int, subprocess.Popen[str]]:
    """Start one process per node, as slurm/rank.sh does; None is a missing rank."""
    folder.mkdir(parents=True)
    port = str(free_port())
    ranks = {}
    for rank, node in enumerate(nodes):
        if node is None:
            continue
        variables = {"RANK": str(rank), "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": f"n{rank + 1}"}

        def limit(files: int = node.files) -> None:
            if files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        ranks[rank] = subprocess.Popen(
            [sys.executable, str(RANK), node.fault, *map(str, node.times), *command(options | node.changes)],
            cwd=ROOT,
            env=environment() | variables | node.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limit,
        )
    return ranks


def wait_for(rank: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a rank."""
    output, _ = rank.communicate(timeout=SECONDS)
    return rank.returncode, output


def test_two_nodes_without_faults(tmp_path: Path, run_options: dict[str, str]) -> None:
    """Every check runs on both nodes, and no file is left behind."""
    ranks = start(tmp_path / "launch", run_options, [Node(), Node()])
    code, output = wait_for(ranks[0])
    assert code == 0, output
    code, other = wait_for(ranks[1])
    assert code == 0 and "doctor:" not in other, "only rank 0 prints"
    assert "doctor: no errors." in output and "ERROR" not in output
    for check in ("versions", "code", "open files", "TMPDIR", "extensions", "out", "data", "weights", "shared out"):
        assert re.search(rf"{check} +│ ok on 2 nodes", output), check
    assert re.search(r"settings +│ ok", output)
    assert re.search(r"all-reduce +│ 16 MiB in [\d.]+ ms, [\d.]+ GB/s", output)
    assert "stage 3" in output and "float32 (model.dtype auto)" in output and "sdpa" in output
    assert not list(Path(run_options["out"]).parent.glob(".doctor*"))


def test_errors_and_differences_name_the_node(tmp_path: Path, run_options: dict[str, str]) -> None:
    """The second node has other packages, data, output folder, network and limits."""
    packages = tmp_path / "packages"
    for name, found in (("safetensors", "0.7.1"), ("peft", "0.20.0")):
        info = packages / f"{name}-{found}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    (tmp_path / "other").mkdir()
    node = Node(
        changes={"data.root": str(tmp_path / "nowhere"), "out": str(tmp_path / "other" / "run")},
        environment={"PYTHONPATH": f"{ROOT}:{packages}", "NCCL_SOCKET_IFNAME": "ib0"},
        files=200,
    )
    first = Node(environment={"NCCL_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)})
    ranks = start(tmp_path / "launch", run_options, [first, node])
    code, output = wait_for(ranks[0])
    assert code == 1 and wait_for(ranks[1])[0] == 1
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    for text in (
        r"safetensors is 0\.7\.1 here, but 0\.8\.\d+ on n1",
        r"peft is 0\.20\.0, but this code needs ",
        r".*nowhere/prepared is not a prepared data set",
        r"a process may open 200 files",
        r"NCCL_SOCKET_IFNAME is ib0 here, but eth0 on n1",
        r"out: .* is not the same folder",
    ):
        assert any(re.match(f"ERROR: n2: {text}", line) for line in errors), (text, output)
    assert all(line.startswith("ERROR: n2: ") for line in errors), "no error of the other node"
    assert re.search(r"doctor: \d+ errors, on n2\.", output)


def test_a_rank_that_freezes_is_reported(tmp_path: Path, run_options: dict[str, str]) -> None:
    ranks = start(tmp_path / "launch", run_options, [Node(times=(120, 4)), Node("freeze", times=(120, 4))])
    try:
        code, output = wait_for(ranks[0])
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert code == 1
    assert "the all-reduce over gloo failed" in output and re.search(r"\[?1\]? failed to pass monitoredBarrier", output)


def test_a_missing_rank_is_reported(tmp_path: Path, run_options: dict[str, str]) -> None:
    code, output = wait_for(start(tmp_path / "launch", run_options, [Node(times=(3, 3)), None])[0])
    assert code == 1 and "rank(s) 1 did not connect within 3 s; connected are the nodes n1" in output


def test_a_missing_rank_0_is_reported(tmp_path: Path, run_options: dict[str, str]) -> None:
    code, output = wait_for(start(tmp_path / "launch", run_options, [None, Node(times=(3, 3))])[1])
    assert code == 1 and "ERROR: n2: rank 1 has no connection to other ranks" in output


def test_wrong_sum_through_torchrun(run_options: dict[str, str]) -> None:
    """torchrun's agent hosts the store. Both ranks are on one node, and rank 1 computes a wrong sum."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(RANK)]
    done = subprocess.run(
        [*torchrun, "sum", "120", "60", *command(run_options)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert "gives wrong sums (1 of 4194304 numbers, 4.0 instead of 3.0)" in done.stdout


def test_a_single_machine_without_options(tmp_path: Path) -> None:
    """Works from any folder; only packages and limits are checked."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "doctor.py")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "doctor: no errors." in done.stdout and "weights" not in done.stdout
