"""A Slurm cluster on this machine (up.sh): submit jobs, read their state and logs, power nodes off, cut links."""

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
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT = 300
"""Seconds that `Cluster.wait_until` waits at most."""
CLUSTER_ENV = """
activate() {{ export PATH={path}:$PATH {variables}; }}
CONTAINER=()
SRUN_EXTRA=()
MAX_REQUEUES=2
"""


def missing_requirement() -> str:
    """Reason why no cluster can run on this machine; empty if one can."""
    if os.geteuid() != 0:
        return "a cluster on one machine needs root"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
    if absent := [name for name in programs if shutil.which(name) is None]:
        return f"{', '.join(absent)} not installed: apt-get install {PACKAGES}"
    probe = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "true"], check=False)
    return "" if probe.returncode == 0 else "namespaces not available (a container without CAP_SYS_ADMIN)"


@dataclass(frozen=True)
class Cluster:
    """A running cluster with the nodes n1, n2, ...

    Attributes:
        folder: the cluster's files and commands.
        root: repository root that jobs are submitted from (`make_root`).
    """

    folder: Path
    root: Path

    def run(self, *command: str) -> str:
        """Run a command on the login node, in `root`; returns its output."""
        line = [str(self.folder / "in-cluster"), *command]
        done = subprocess.run(line, cwd=self.root, text=True, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """Submit a job (options of sbatch, a script, options of the script); returns its id."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def power(self, state: str, node: str) -> None:
        """``off`` kills every process of the node, as a power failure does; ``on`` boots the node."""
        subprocess.run([str(self.folder / "node-power"), state, node], timeout=30, check=True)

    def link(self, state: str, node: str) -> None:
        """``down`` disconnects a node from the network, ``up`` connects it."""
        subprocess.run([str(self.folder / "node-link"), state, node], timeout=30, check=True)

    def job(self, job: str) -> dict[str, str]:
        """Fields of a job from `scontrol show job`: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def log(self, job: str) -> str:
        """The log of a job's batch shell."""
        path = self.root / "logs" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_until(self, job: str, name: str, condition: Callable[[], object], pause: float = 0.2) -> None:
        """Wait until a condition (`name`, for the message) holds.

        Raises:
            AssertionError: the job ended first, or `LIMIT` seconds are over; the message has the job's logs.
        """
        deadline, next_poll = time.monotonic() + LIMIT, 0.0
        while not condition():
            now = time.monotonic()
            if now >= next_poll:  # scontrol costs 20 ms of a CPU that the job needs
                state, next_poll = self.job(job)["JobState"], now + 1.0
                if now > deadline or (state in END_STATES and not condition()):
                    raise AssertionError(f"job {job} is {state}, and not yet {name}.\n{self.logs(job)}")
            time.sleep(pause)

    def logs(self, job: str) -> str:
        """The last 3000 characters of each log of a job: the batch shell's and every rank's."""
        paths = [self.root / "logs" / f"{job}.log", *sorted((self.root / "logs" / job).glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def end(self, job: str) -> str:
        """Wait for the end of a job; returns its state."""
        self.wait_until(job, "ended", lambda: self.job(job)["JobState"] in END_STATES, pause=0.5)
        return self.job(job)["JobState"]


def make_root(folder: Path) -> Path:
    """Create a repository root for `sbatch`: links to this one, own slurm/ and logs/. The real one stays unchanged."""
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
def running_cluster(folder: Path, root: Path, nodes: int) -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end of the block."""
    prefix = f"w{os.getpid()}"  # names of network interfaces have at most 15 characters
    try:
        subprocess.run([HERE / "up.sh", folder, prefix, str(nodes)], timeout=120, check=True)
        yield Cluster(folder, make_root(root))
    finally:
        subprocess.run([HERE / "down.sh", folder], timeout=60, check=True)
