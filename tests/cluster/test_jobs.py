"""Jobs on a real Slurm on this machine: training on two nodes with time limits, lost nodes and cancellation."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rank_processes import Ranks
from runs import ZERO3, World
from scenario import NOT_EXACT, Row, note
from slurm_cluster import HERE, Cluster, make_root

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STEPS, SAVE_EVERY = 12, 5
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def stand_in(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The same cluster, with a repository whose train.py and doctor.py take no time."""
    root = make_root(tmp_path_factory.mktemp("stub_launcher") / "repository")
    (root / "launchers").unlink()
    (root / "launchers").mkdir()
    for name in ("train.py", "doctor.py", "evaluate.py"):
        (root / "launchers" / name).symlink_to(HERE / "stub_launcher.py")
    return Cluster(cluster.folder, root)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics, without what no two runs have alike."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name not in NOT_EXACT} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "checkpoints" / f"step-{STEPS:06d}" / "trainable.safetensors").read_bytes()


def words(world: World, out: Path) -> list[str]:
    """Two nodes with one rank each, whose loaders have a process of their own."""
    options = world.arguments(out, train__steps=STEPS, train__save_every=SAVE_EVERY, data__workers=1)
    return ["--nodes=2", "slurm/train.sbatch", "--skip-doctor", *options]


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happens to, without a cluster: what every job must equal to the last bit."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = ["--deepspeed", str(ZERO3), *words(world, folder / "run")[3:]]
    with Ranks(2, ["launchers/train.py", *options], folder) as ranks:
        assert ranks.codes(300) == [0, 0], ranks.said(0)[-4000:] + ranks.said(1)[-4000:]
    assert [line["step"] for line in metrics(folder / "run")] == list(range(1, STEPS + 1))
    return folder / "run"


def assert_done(cluster: Cluster, job: str, out: Path, undisturbed: Path) -> None:
    """A job has trained to the end, each rank wrote its log, and what came out is what the undisturbed run has."""
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert "train: done" in cluster.log(job)
    logs = cluster.root / "logs" / job
    assert sorted(logs.glob("*.log")) == [logs / f"rank-{rank}.log" for rank in (0, 1)]
    assert metrics(out) == metrics(undisturbed)
    assert weights(out) == weights(undisturbed)


@pytest.mark.nightly
def test_training_on_two_nodes(cluster: Cluster, world: World, undisturbed: Path, tmp_path: Path) -> None:
    """By day there is the one of which a node dies."""
    out = tmp_path / "run"
    assert_done(cluster, cluster.submit(*words(world, out)), out, undisturbed)


def test_a_folder_on_one_node_only_is_found_before_training(cluster: Cluster, world: World) -> None:
    """/dev/shm is every node's own: rank 0 would write checkpoints that the next start, elsewhere, does not find."""
    options = world.arguments(Path("/dev/shm/run"), train__steps=STEPS)
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", *options)
    assert cluster.end(job) == "FAILED", cluster.logs(job)
    assert "ERROR: n2: out: /dev/shm" in cluster.log(job), cluster.logs(job)
    assert "not fit to train; not requeued" in cluster.log(job)


def reach(cluster: Cluster, job: str, out: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    cluster.until(job, f"at step {step}", lambda: len(metrics(out)) >= step)


def restarted(cluster: Cluster, job: str, times: int) -> None:
    """Wait until Slurm runs a job again."""

    def happened() -> bool:
        now = cluster.job(job)
        return now["Restarts"] == str(times) and now["JobState"] == "RUNNING"

    cluster.until(job, f"restarted {times} times", happened, pause=0.5)


def test_a_run_survives_its_time_limit_and_a_lost_node(
    cluster: Cluster, world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    """USR1 between two checkpoints, then a node without power; nothing is repaired by hand, nothing is lost."""
    out = tmp_path / "run"
    job = cluster.submit(*words(world, out))
    reach(cluster, job, out, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    restarted(cluster, job, 1)
    stopped = len(metrics(out))
    assert 2 <= stopped < SAVE_EVERY, "stopped at a step that saves by itself: the test would show less"
    assert "stopped by SIGUSR1; requeued" in cluster.log(job), cluster.logs(job)
    assert (out / "checkpoints" / f"step-{stopped:06d}").is_dir()
    reach(cluster, job, out, SAVE_EVERY + 1)
    cluster.power("off", "n2")
    try:
        restarted(cluster, job, 2)
        assert cluster.job(job)["NodeList"] == "n[1,3]"
        assert_done(cluster, job, out, undisturbed)
    finally:
        cluster.power("on", "n2")
    note(record_property, [Row("Slurm: SIGUSR1 before the time limit", 1, 1), Row("Slurm: node without power", 1, 1)])


def test_exit_of_a_job(stand_in: Cluster) -> None:
    """All at once: they wait for Slurm, not for processors."""
    submit = stand_in.submit
    two, alone = (
        ("--nodes=2", "slurm/train.sbatch", "--skip-doctor", "--plan"),
        ("slurm/train.sbatch", "--skip-doctor", "--plan"),
    )
    done = submit(*two, "0")
    mistake = submit(*two, "1,0")
    lost = submit(*two, "75,9,0")
    in_vain = submit(*two, "75,9,75")
    capped = submit(*alone, "85,85,85")
    limit = submit(*alone, "wait,0")
    terminated = submit(*alone, "wait,0")
    deaf = submit("--nodes=2", "slurm/evaluate.sbatch", "--plan", "deaf,0")
    unfit = submit("slurm/train.sbatch", "--plan", "1")
    sweep = submit("--array=0-1", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=85|0,9", "--out", "x")
    beyond = submit("--array=2", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=0|0,0", "--out", "x")
    for job, name in ((limit, "USR1"), (terminated, "TERM"), (deaf, "USR1")):
        stand_in.until(job, "started", lambda job=job: stand_in.job(job)["JobState"] == "RUNNING")
        stand_in.run("scancel", "--batch", f"--signal={name}", job)  # as likely as not before the ranks are there

    def ended(job: str, state: str, restarts: int, *sentences: str) -> None:
        assert stand_in.end(job) == state, stand_in.logs(job)
        assert stand_in.job(job)["Restarts"] == str(restarts), stand_in.logs(job)
        for sentence in sentences:
            assert sentence in stand_in.log(job), stand_in.logs(job)

    ended(done, "COMPLETED", 0, "train: done")
    ended(mistake, "FAILED", 0, "ended with 1; not requeued", "start 0: 1")  # the end of the rank's log
    ended(lost, "COMPLETED", 2, "ended with 75; requeued", "ended with 137; requeued")
    ended(in_vain, "FAILED", 2, "ended with 75; not requeued: the third start in a row that was lost within minutes")
    ended(capped, "FAILED", 2, "this was start 2, and MAX_REQUEUES in slurm/cluster.env is 2")
    ended(limit, "COMPLETED", 1, "SIGUSR1", "requeued")
    ended(deaf, "COMPLETED", 1, "SIGUSR1", "stopped by SIGUSR1; requeued")
    ended(terminated, "FAILED", 0, "stopped by SIGTERM; not requeued")
    ended(unfit, "FAILED", 0, "not fit to train; not requeued")
    assert not (stand_in.root / "logs" / unfit / "rank-0.log").exists(), "training started on a node that is not fit"
    ended(f"{sweep}_0", "FAILED", 1, "stopped by SIGUSR1; requeued")
    ended(f"{sweep}_1", "COMPLETED", 0)  # its neighbour was requeued, not the array
    ended(f"{beyond}_2", "FAILED", 0, "the sweep has 2 runs and this is array task 2; give sbatch --array=0-1.")


@pytest.mark.nightly
def test_ranks_of_a_disconnected_node_do_not_write(
    cluster: Cluster, world: World, undisturbed: Path, tmp_path: Path, record_property: Record
) -> None:
    """The first node (batch shell, rank 0) loses its network and keeps running while the job runs elsewhere."""
    out = tmp_path / "run"
    job = cluster.submit(*words(world, out))
    reach(cluster, job, out, SAVE_EVERY + 1)
    cut = cluster.job(job)["BatchHost"]
    cluster.link("down", cut)
    try:
        restarted(cluster, job, 1)
        assert cut not in cluster.job(job)["BatchHost"]
        ghost = cluster.root / "logs" / job / "start-0" / "train" / f"exit-0-{cut}"
        cluster.until(job, "rid of its old rank 0", ghost.exists)
        assert ghost.read_text() == "75\n", cluster.logs(job)
        assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    finally:
        cluster.link("up", cut)
    deadline = time.monotonic() + 90
    while "idle" not in cluster.run("sinfo", "-h", "-n", cut, "-o", "%t"):
        assert time.monotonic() < deadline, "the node did not come back"
        time.sleep(0.5)
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "1"), cluster.logs(job)
    assert metrics(out) == metrics(undisturbed)
    assert weights(out) == weights(undisturbed)
    note(record_property, [Row("Slurm: link cut, the old ranks keep running", 1, 1)])


@pytest.mark.nightly
def test_a_cancelled_run_resumes_with_the_same_command(
    cluster: Cluster, world: World, undisturbed: Path, tmp_path: Path
) -> None:
    """scancel sends SIGTERM to all processes of the job, loader workers too; KillWait seconds are left for a save."""
    out = tmp_path / "run"
    job = cluster.submit(*words(world, out))
    reach(cluster, job, out, 2)
    cluster.run("scancel", "--signal=TERM", job)
    assert cluster.end(job) == "FAILED", cluster.logs(job)
    assert "stopped by SIGTERM; not requeued" in cluster.log(job)
    assert cluster.end(cluster.submit(*words(world, out))) == "COMPLETED"
    assert metrics(out) == metrics(undisturbed)
    evaluation = ["--checkpoint", str(out), "--task", "scanrefer", "--max_new_tokens", "4", "--limit", "4"]
    job = cluster.submit("--nodes=2", "slurm/evaluate.sbatch", *evaluation)
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert (out / "evaluation").is_dir()


@pytest.mark.nightly
def test_prepare_as_a_job(cluster: Cluster, world: World, tmp_path: Path) -> None:
    options = ["--root", str(world.folder / "scenes"), "--splits", "[val]", "--frames.count", "2"]
    job = cluster.submit("slurm/prepare.sbatch", "scanrefer", *options, "--visibility", "depth", "--out", str(tmp_path))
    missing = cluster.submit("slurm/prepare.sbatch", "scanrefer", "--root", "/nowhere")
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert (tmp_path / "val" / "manifest.json").exists()
    assert cluster.end(missing) == "FAILED"
    assert "ended with 1; not requeued" in cluster.log(missing), cluster.logs(missing)


@pytest.mark.nightly
def test_the_deepspeed_launcher_with_a_hostfile(
    cluster: Cluster, world: World, undisturbed: Path, tmp_path: Path
) -> None:
    """For clusters without Slurm, which here only starts the two launchers; without ssh, as there is none."""
    out = tmp_path / "run"
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    options = words(world, out)[3:]
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--master_addr", "n1"]
    command = [*launcher, "launchers/train.py", "--deepspeed", "ds_configs/zero3.json", *options]
    at = len(launcher)
    line = f'{shlex.join(command[:at])} --node_rank "$SLURM_PROCID" {shlex.join(command[at:])}'
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n. slurm/cluster.env\nactivate\nexec {line}\n")
    job = cluster.submit("--nodes=2", "--output=logs/%j.log", f"--wrap=srun bash {tmp_path / 'job.sh'}")
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert metrics(out) == metrics(undisturbed)
