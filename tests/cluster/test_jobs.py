"""Jobs on a real Slurm: training on two nodes with time limits, lost nodes and cancellation."""

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
from scenario import NOT_EXACT, Row, record_rows
from slurm_cluster import HERE, Cluster, make_root

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STEPS, SAVE_EVERY = 12, 5
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def stub_cluster(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The same cluster; train.py, doctor.py and evaluate.py of its repository are stub_launcher.py."""
    root = make_root(tmp_path_factory.mktemp("stub_launcher") / "repository")
    (root / "launchers").unlink()
    (root / "launchers").mkdir()
    for name in ("train.py", "doctor.py", "evaluate.py"):
        (root / "launchers" / name).symlink_to(HERE / "stub_launcher.py")
    return Cluster(cluster.folder, root)


def metrics(out: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl, without times and sizes."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name not in NOT_EXACT} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "checkpoints" / f"step-{STEPS:06d}" / "trainable.safetensors").read_bytes()


def train_job(world: World, out: Path) -> list[str]:
    """Arguments of sbatch for training on two nodes with one rank each and one DataLoader worker per rank."""
    options = world.arguments(out, train__steps=STEPS, train__save_every=SAVE_EVERY, data__workers=1)
    return ["--nodes=2", "slurm/train.sbatch", "--skip-doctor", *options]


@pytest.fixture(scope="module")
def reference_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks without faults and without Slurm. Metrics and weights of every job must be bitwise equal."""
    folder = tmp_path_factory.mktemp("reference")
    options = ["--deepspeed", str(ZERO3), *train_job(world, folder / "run")[3:]]
    with Ranks(2, ["launchers/train.py", *options], folder) as ranks:
        assert ranks.codes(300) == [0, 0], ranks.output(0)[-4000:] + ranks.output(1)[-4000:]
    assert [line["step"] for line in metrics(folder / "run")] == list(range(1, STEPS + 1))
    return folder / "run"


def assert_done(cluster: Cluster, job: str, out: Path, reference_run: Path) -> None:
    """Assert that a job completed, each rank wrote a log, and metrics and weights equal the reference run's."""
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert "train: done" in cluster.log(job)
    logs = cluster.root / "logs" / job
    assert sorted(logs.glob("*.log")) == [logs / f"rank-{rank}.log" for rank in (0, 1)]
    assert metrics(out) == metrics(reference_run)
    assert weights(out) == weights(reference_run)


@pytest.mark.nightly
def test_training_on_two_nodes(cluster: Cluster, world: World, reference_run: Path, tmp_path: Path) -> None:
    """A job without faults."""
    out = tmp_path / "run"
    assert_done(cluster, cluster.submit(*train_job(world, out)), out, reference_run)


def test_a_node_local_output_folder_fails_before_training(cluster: Cluster, world: World) -> None:
    """/dev/shm is local to a node: a later launch on other nodes would not find the checkpoints."""
    options = world.arguments(Path("/dev/shm/run"), train__steps=STEPS)
    job = cluster.submit("--nodes=2", "slurm/train.sbatch", *options)
    assert cluster.end(job) == "FAILED", cluster.logs(job)
    assert "ERROR: n2: out: /dev/shm" in cluster.log(job), cluster.logs(job)
    assert "not requeued" in cluster.log(job)
    assert not (cluster.root / "logs" / job / "rank-0.log").exists(), "training was launched after the doctor failed"


def wait_for_step(cluster: Cluster, job: str, out: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    cluster.wait_until(job, f"at step {step}", lambda: len(metrics(out)) >= step)


def wait_for_restart(cluster: Cluster, job: str, times: int) -> None:
    """Wait until Slurm has restarted a job `times` times."""

    def restarted() -> bool:
        now = cluster.job(job)
        return now["Restarts"] == str(times) and now["JobState"] == "RUNNING"

    cluster.wait_until(job, f"restarted {times} times", restarted, pause=0.5)


def test_a_job_is_requeued_after_the_time_limit_and_a_lost_node(
    cluster: Cluster, world: World, reference_run: Path, tmp_path: Path, record_property: Record
) -> None:
    """SIGUSR1 between two checkpoints, then a power failure of a node: the job is requeued twice and completes."""
    out = tmp_path / "run"
    job = cluster.submit(*train_job(world, out))
    wait_for_step(cluster, job, out, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job, 1)
    stopped = len(metrics(out))
    assert 2 <= stopped < SAVE_EVERY, (
        "the step is a multiple of save_every, so it would have a checkpoint without the signal"
    )
    assert "stopped by SIGUSR1; requeued" in cluster.log(job), cluster.logs(job)
    assert (out / "checkpoints" / f"step-{stopped:06d}").is_dir()
    wait_for_step(cluster, job, out, SAVE_EVERY + 1)
    cluster.power("off", "n2")
    try:
        wait_for_restart(cluster, job, 2)
        assert cluster.job(job)["NodeList"] == "n[1,3]"
        assert_done(cluster, job, out, reference_run)
    finally:
        cluster.power("on", "n2")
    record_rows(
        record_property, [Row("Slurm: SIGUSR1 before the time limit", 1, 1), Row("Slurm: node without power", 1, 1)]
    )


def test_job_state_for_each_exit_code_and_signal(stub_cluster: Cluster) -> None:
    """Final state, restarts and log of jobs by exit code and signal. All jobs run at once, as they need no CPU time."""
    submit = stub_cluster.submit
    one_node = ("slurm/train.sbatch", "--skip-doctor", "--plan")
    two_nodes = ("--nodes=2", *one_node)
    done = submit(*two_nodes, "0")
    user_error = submit(*two_nodes, "1,0")
    lost = submit(*two_nodes, "75,9,0")
    lost_thrice = submit(*two_nodes, "75,9,75")
    capped = submit(*one_node, "85,85,85")
    limit = submit(*one_node, "wait,0")
    terminated = submit(*one_node, "wait,0")
    evaluation = submit("--nodes=2", "slurm/evaluate.sbatch", "--plan", "no-handler,0")
    doctor_failed = submit("slurm/train.sbatch", "--plan", "1")
    sweep = submit("--array=0-1", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=85|0,9", "--out", "x")
    beyond = submit("--array=2", "slurm/sweep.sbatch", "--skip-doctor", "--over", "plan=0|0,0", "--out", "x")
    for job, name in ((limit, "USR1"), (terminated, "TERM"), (evaluation, "USR1")):
        stub_cluster.wait_until(job, "started", lambda job=job: stub_cluster.job(job)["JobState"] == "RUNNING")
        stub_cluster.run("scancel", "--batch", f"--signal={name}", job)  # possibly before the ranks have been launched

    def ended(job: str, state: str, restarts: int, *messages: str) -> None:
        assert stub_cluster.end(job) == state, stub_cluster.logs(job)
        assert stub_cluster.job(job)["Restarts"] == str(restarts), stub_cluster.logs(job)
        for message in messages:
            assert message in stub_cluster.log(job), stub_cluster.logs(job)

    ended(done, "COMPLETED", 0, "train: done")
    ended(
        user_error, "FAILED", 0, "ended with 1; not requeued", "launch 0: 1"
    )  # the job's log has the end of the rank's
    ended(lost, "COMPLETED", 2, "ended with 75; requeued", "ended with 137; requeued")
    ended(lost_thrice, "FAILED", 2, "ended with 75; not requeued")
    assert "MAX_REQUEUES" not in stub_cluster.log(lost_thrice), "stopped by the limit, not by three lost launches"
    ended(capped, "FAILED", 2, "MAX_REQUEUES in slurm/cluster.env is 2")
    ended(limit, "COMPLETED", 1, "SIGUSR1", "requeued")
    ended(evaluation, "COMPLETED", 1, "SIGUSR1", "stopped by SIGUSR1; requeued")
    ended(terminated, "FAILED", 0, "stopped by SIGTERM; not requeued")
    ended(doctor_failed, "FAILED", 0, "not requeued")
    assert not (stub_cluster.root / "logs" / doctor_failed / "rank-0.log").exists(), (
        "training was launched after the doctor failed"
    )
    ended(f"{sweep}_0", "FAILED", 1, "stopped by SIGUSR1; requeued")
    ended(f"{sweep}_1", "COMPLETED", 0)  # the other array task was requeued, not this one
    ended(f"{beyond}_2", "FAILED", 0, "--array=0-1")


@pytest.mark.nightly
def test_ranks_of_a_disconnected_node_exit_without_writing(
    cluster: Cluster, world: World, reference_run: Path, tmp_path: Path, record_property: Record
) -> None:
    """The first node (batch shell, rank 0) loses its network but keeps running; the job restarts on other nodes."""
    out = tmp_path / "run"
    job = cluster.submit(*train_job(world, out))
    wait_for_step(cluster, job, out, SAVE_EVERY + 1)
    cut = cluster.job(job)["BatchHost"]
    cluster.link("down", cut)
    try:
        wait_for_restart(cluster, job, 1)
        assert cut not in cluster.job(job)["BatchHost"]
        old_rank = cluster.root / "logs" / job / "start-0" / "train" / f"exit-0-{cut}"
        cluster.wait_until(job, "without its old rank 0", old_rank.exists)
        assert old_rank.read_text() == "75\n", cluster.logs(job)
        assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    finally:
        cluster.link("up", cut)
    deadline = time.monotonic() + 90
    while "idle" not in cluster.run("sinfo", "-h", "-n", cut, "-o", "%t"):
        assert time.monotonic() < deadline, "the node did not come back"
        time.sleep(0.5)
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "1"), cluster.logs(job)
    assert metrics(out) == metrics(reference_run)
    assert weights(out) == weights(reference_run)
    record_rows(record_property, [Row("Slurm: link cut, the old ranks keep running", 1, 1)])


@pytest.mark.nightly
def test_a_cancelled_run_resumes_with_the_same_command(
    cluster: Cluster, world: World, reference_run: Path, tmp_path: Path
) -> None:
    """scancel sends SIGTERM to all processes of the job, also DataLoader workers; a save has KillWait seconds."""
    out = tmp_path / "run"
    job = cluster.submit(*train_job(world, out))
    wait_for_step(cluster, job, out, 2)
    cluster.run("scancel", "--signal=TERM", job)
    assert cluster.end(job) == "FAILED", cluster.logs(job)
    assert "stopped by SIGTERM; not requeued" in cluster.log(job)
    assert cluster.end(cluster.submit(*train_job(world, out))) == "COMPLETED"
    assert metrics(out) == metrics(reference_run)
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
    cluster: Cluster, world: World, reference_run: Path, tmp_path: Path
) -> None:
    """`deepspeed --hostfile --no_ssh`, for clusters without Slurm. Here Slurm only runs the two launchers."""
    out = tmp_path / "run"
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    options = train_job(world, out)[3:]
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--master_addr", "n1"]
    command = [*launcher, "launchers/train.py", "--deepspeed", "ds_configs/zero3.json", *options]
    at = len(launcher)
    line = f'{shlex.join(command[:at])} --node_rank "$SLURM_PROCID" {shlex.join(command[at:])}'
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n. slurm/cluster.env\nactivate\nexec {line}\n")
    job = cluster.submit("--nodes=2", "--output=logs/%j.log", f"--wrap=srun bash {tmp_path / 'job.sh'}")
    assert cluster.end(job) == "COMPLETED", cluster.logs(job)
    assert metrics(out) == metrics(reference_run)
