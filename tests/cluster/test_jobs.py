"""Jobs on a real Slurm of this machine alone: training on two nodes through everything that clusters do to jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import HERE, Cluster, make_root

from runs import World

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STEPS, SAVE_EVERY = 12, 5
TIMED = ("samples_per_s", "tokens_per_s", "step_s")


@pytest.fixture(scope="module")
def stand_in(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The same cluster, with a repository whose train.py and doctor.py take no time."""
    root = make_root(tmp_path_factory.mktemp("stand_in") / "repository")
    (root / "launchers").unlink()
    (root / "launchers").mkdir()
    for name in ("train.py", "doctor.py"):
        (root / "launchers" / name).symlink_to(HERE / "stand_in.py")
    return Cluster(cluster.folder, root)


def test_how_a_job_ends(stand_in: Cluster) -> None:
    """All at once: they wait for Slurm, not for processors."""
    submit = stand_in.submit
    two, alone = ("--nodes=2", "slurm/train.sbatch", "--skip-doctor", "--plan"), ("slurm/train.sbatch", "--skip-doctor", "--plan")
    done = submit(*two, "0")
    mistake = submit(*two, "1,0")
    lost = submit(*two, "75,9,0")
    capped = submit(*alone, "75,75,75")
    limit = submit(*alone, "wait,0")
    terminated = submit(*alone, "wait,0")
    unfit = submit("slurm/train.sbatch", "--plan", "1")
    sweep = submit("--array=0-1", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=85|0,9", "--out", "x")
    beyond = submit("--array=2", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=0|0", "--out", "x")
    for job, name in ((limit, "USR1"), (terminated, "TERM")):
        stand_in.until(job, "started", lambda job=job: (stand_in.job(job)["JobState"] == "RUNNING"))
        stand_in.run("scancel", "--batch", f"--signal={name}", job)  # as likely as not before the ranks are there

    def ended(job: str, state: str, restarts: int, *sentences: str) -> None:
        assert stand_in.end(job) == state, stand_in.logs(job)
        assert stand_in.job(job)["Restarts"] == str(restarts), stand_in.logs(job)
        for sentence in sentences:
            assert sentence in stand_in.log(job), stand_in.logs(job)

    ended(done, "COMPLETED", 0, "train: done")
    ended(mistake, "FAILED", 0, "ended with 1; not requeued", "start 0: 1")  # the end of the rank's log
    ended(lost, "COMPLETED", 2, "ended with 75; requeued", "ended with 137; requeued")
    ended(capped, "FAILED", 2, "this was start 2, and MAX_REQUEUES in slurm/cluster.env is 2")
    ended(limit, "COMPLETED", 1, "SIGUSR1", "requeued")
    ended(terminated, "FAILED", 0, "stopped by SIGTERM; not requeued")
    ended(unfit, "FAILED", 0, "ended with 1; not requeued")
    assert not (stand_in.root / "logs" / unfit / "rank-0.log").exists(), "training started on a node that is not fit"
    ended(f"{sweep}_0", "FAILED", 1, "stopped by SIGUSR1; requeued")
    ended(f"{sweep}_1", "COMPLETED", 0)  # its neighbour was requeued, not the array
    ended(f"{beyond}_2", "FAILED", 0, "the sweep has 2 runs and this is array task 2; give sbatch --array=0-1.")
