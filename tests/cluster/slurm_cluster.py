"""A Slurm cluster on this machine (up.sh), a repository root to submit from, and operations of the tests on both."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fork_server import ROOT, VARIABLES

HERE = Path(__file__).parent
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT = 300
"""Seconds that anything may take."""
CLUSTER_ENV = """
activate() {{ export PATH={path}:$PATH {variables}; }}
CONTAINER=()
SRUN_EXTRA=()
MAX_REQUEUES=2
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a cluster of one machine needs root"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
    if lacking := [name for name in programs if shutil.which(name) is None]:
        return f"no {', '.join(lacking)} here: apt-get install {PACKAGES}"
    probe = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"], check=False)
    return "" if probe.returncode == 0 else "no namespaces here (a container without CAP_SYS_ADMIN)"


@dataclass(frozen=True)
class Cluster:
    """A running cluster with the nodes n1, n2, ...

    Attributes:
        folder: of its files and commands.
        root: what jobs are submitted from: this repository by links, with a cluster.env of its own.
    """

    folder: Path
    root: Path

    def run(self, *command: str) -> str:
        """Output of a command on the login node, in `root`."""
        words = [str(self.folder / "in-cluster"), *command]
        done = subprocess.run(words, cwd=self.root, text=True, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> str:
        """The id of a new job: options of sbatch, a script and its options."""
        return self.run("sbatch", "--parsable", *words).strip()

    def power(self, state: str, node: str) -> None:
        """``off`` is what a pulled plug is to processes; ``on`` boots the node again."""
        subprocess.run([str(self.folder / "node-power"), state, node], timeout=30, check=True)

    def link(self, state: str, node: str) -> None:
        """``down`` cuts a node's network, ``up`` puts it back."""
        subprocess.run([str(self.folder / "node-link"), state, node], timeout=30, check=True)

    def job(self, job: str) -> dict[str, str]:
        """Fields of a job from `scontrol show job`: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def log(self, job: str) -> str:
        """The log of a job's batch shell."""
        path = self.root / "logs" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def until(self, job: str, what: str, happened: Callable[[], object], pause: float = 0.2) -> None:
        """Wait for something that a job does; its logs are in the message if it does not in `LIMIT` seconds."""
        give_up, look = time.monotonic() + LIMIT, 0.0
        while not happened():
            now = time.monotonic()
            if now >= look:  # every question to Slurm costs 20 ms of a processor that the job needs
                state, look = self.job(job)["JobState"], now + 1.0
                if now > give_up or (state in ENDED and not happened()):
                    raise AssertionError(f"job {job} is {state}, and not yet {what}.\n{self.logs(job)}")
            time.sleep(pause)

    def logs(self, job: str) -> str:
        """The end of everything that a job wrote."""
        paths = [self.root / "logs" / f"{job}.log", *sorted((self.root / "logs" / job).glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def end(self, job: str) -> str:
        """How a job ended."""
        self.until(job, "over", lambda: self.job(job)["JobState"] in ENDED, pause=0.5)
        return self.job(job)["JobState"]


def make_root(folder: Path) -> Path:
    """A folder that is this repository to `sbatch`, so that the tests leave nothing in the real one."""
    (folder / "logs").mkdir(parents=True)
    for name in ("launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    variables = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
    (folder / "slurm" / "cluster.env").write_text(
        CLUSTER_ENV.format(path=Path(sys.executable).parent, variables=variables)
    )
    return folder


@contextlib.contextmanager
def running(folder: Path, root: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    prefix = f"w{os.getpid()}"  # an interface's name has 15 characters at most
    try:
        subprocess.run([HERE / "up.sh", folder, prefix, str(nodes)], timeout=120, check=True)
        yield Cluster(folder, make_root(root))
    finally:
        subprocess.run([HERE / "down.sh", folder], timeout=60, check=True)
