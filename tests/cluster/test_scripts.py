"""Batch scripts without a cluster: help, srun lines, sweeps, errors, and exit codes of a rank."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from slurm_cluster import make_root
from w2r2_ds.training.fault_tolerance import exit_codes

SCRIPTS = ("train", "evaluate", "prepare", "sweep", "ablate")
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURMD_NODENAME": "gpu-2",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("scripts") / "repository")


def script(root: Path, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script in its own bash, as sbatch does."""
    command = ["bash", str(root / "slurm" / f"{name}.sbatch"), *words]
    return subprocess.run(
        command, env=os.environ | environment, text=True, capture_output=True, timeout=60, cwd="/", check=False
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The arguments of every srun line that a dry run prints."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun ")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works_in_any_folder(root: Path, name: str) -> None:
    done = script(root, name, "--help")
    assert done.returncode == 0 and f"slurm/{name}.sbatch" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_from_another_folder_is_rejected(root: Path, name: str, tmp_path: Path) -> None:
    """sbatch runs a copy in its spool folder, so the script finds the repository by the folder of submission only."""
    done = script(root, name, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}.sbatch: {tmp_path} ") and f"slurm/{name}.sbatch" in line


def test_a_job_runs_the_doctor_and_then_one_rank_per_gpu(root: Path) -> None:
    shape = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    doctor, train = lines(script(root, "train", "--dry-run", "--config", "a b.yaml", **shape))
    for line in (doctor, train):
        assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--kill-on-bad-exit=1"} <= set(line)
    options = ["--deepspeed", "ds_configs/zero3.json", "--config", "a b.yaml", "--resume", "auto"]
    assert doctor[-len(options) - 2 :] == ["python", "launchers/doctor.py", *options]
    assert train[-len(options) - 2 :] == ["python", "launchers/train.py", *options]
    (train,) = lines(script(root, "train", "--skip-doctor", "--dry-run", "--deepspeed", "other.json", **shape))
    assert train[-6:] == ["python", "launchers/train.py", "--deepspeed", "other.json", "--resume", "auto"]


def test_containers_and_srun_options_come_from_cluster_env(root: Path, tmp_path: Path) -> None:
    other = make_root(tmp_path / "repository")
    with (other / "slurm" / "cluster.env").open("a") as file:
        file.write("SRUN_EXTRA=(--container-image='my image')\nCONTAINER=(apptainer exec --nv image.sif)\n")
    (line,) = lines(script(other, "evaluate", "--dry-run", "--task", "scanqa"))
    at = line.index("slurm/rank.sh")
    assert line[at - 5 : at] == ["--container-image=my image", "apptainer", "exec", "--nv", "image.sif"]
    assert line[at + 2 :] == ["python", "launchers/evaluate.py", "--task", "scanqa"]


def test_a_sweep_has_one_folder_per_combination(root: Path) -> None:
    words = [
        "--over",
        "objective.lambda_det=0.5,1",
        "--over=data.train=[a]|[a,b]|[c/d]",
        "--out",
        "runs/s",
        "--skip-doctor",
    ]
    made = lines(script(root, "sweep", "--dry-run", *words, "--train.steps", "5"))
    given = [dict(word.split("=", 1) for word in line if word.startswith("--") and "=" in word) for line in made]
    points = [
        (options["--objective.lambda_det"], options["--data.train"], line[line.index("--out") + 1])
        for options, line in zip(given, made, strict=True)
    ]
    assert points == [
        ("0.5", "[a]", "runs/s/objective.lambda_det=0.5,data.train=_a_"),
        ("1", "[a]", "runs/s/objective.lambda_det=1,data.train=_a_"),
        ("0.5", "[a,b]", "runs/s/objective.lambda_det=0.5,data.train=_a_b_"),
        ("1", "[a,b]", "runs/s/objective.lambda_det=1,data.train=_a_b_"),
        ("0.5", "[c/d]", "runs/s/objective.lambda_det=0.5,data.train=_c_d_"),
        ("1", "[c/d]", "runs/s/objective.lambda_det=1,data.train=_c_d_"),
    ]
    assert all("--train.steps 5" in shlex.join(line) for line in made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "runs/s"], "--out FOLDER"),
        (["--over", "lambda_det", "--out", "x"], "--over is lambda_det"),
        (["--out", "x", "--over"], "--over needs a value"),
        (["--over", "name=a/b,a_b", "--out", "x"], "--over name=a/b,a_b"),
    ],
)
def test_a_sweep_without_values_is_rejected(root: Path, words: list[str], message: str) -> None:
    done = script(root, "sweep", "--dry-run", *words)
    assert done.returncode == 1 and message in done.stderr


def write_tasks(folder: Path, *tasks: list[list[str]]) -> Path:
    """Files of launchers/ablate.py --slurm: per task its commands."""
    (folder / "slurm").mkdir(parents=True)
    for index, commands in enumerate(tasks):
        text = "".join("\t".join(words) + "\n" for words in commands)
        (folder / "slurm" / f"task-{index}.txt").write_text(text)
    return folder


def test_an_ablation_trains_and_evaluates_every_run(root: Path, tmp_path: Path) -> None:
    first = [
        ["train", "--deepspeed", "x.json", "--data.val=[{path: a b}]"],
        ["evaluate", '--evaluations={"a": {"limit": 1}}'],
    ]
    folder = write_tasks(tmp_path / "out", first, [["train", "--out=r2"]])
    train, evaluate, other = lines(script(root, "ablate", "--dry-run", str(folder), "--skip-doctor", "--train.lr=1"))
    options = ["--deepspeed", "x.json", "--data.val=[{path: a b}]", "--train.lr=1", "--resume", "auto"]
    assert train[train.index("python") :] == ["python", "launchers/train.py", *options]
    assert evaluate[evaluate.index("python") :] == [
        "python",
        "launchers/evaluate.py",
        '--evaluations={"a": {"limit": 1}}',
    ]
    assert other[-4:] == ["--out=r2", "--train.lr=1", "--resume", "auto"]
    assert [line[line.index("slurm/rank.sh") + 1].rpartition("/")[2] for line in (train, evaluate)] == [
        "train",
        "evaluate",
    ]


SRUN = """#!/bin/bash
while [ "$1" != slurm/rank.sh ]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1
exec "$@"
"""
LAUNCHER = """
import pathlib, sys
with open("calls.txt", "a") as file:
    file.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + "\\n")
sys.exit(3 if "--fail" in sys.argv else 0)
"""


def test_a_task_of_an_ablation(tmp_path: Path) -> None:
    """Without Slurm: stubs of srun, scontrol and the launchers."""
    other = make_root(tmp_path / "repository")
    (other / "launchers").unlink()
    (other / "launchers").mkdir()
    for name in ("train", "evaluate"):
        (other / "launchers" / f"{name}.py").write_text(LAUNCHER)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho n1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    commands = [["train", "--out=r"], ["evaluate", "--a"]]
    folder = write_tasks(tmp_path / "out", commands, [["train", "--fail"], ["evaluate", "--c"]])
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
    environment = {**job, "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    environment["SLURM_SUBMIT_DIR"] = str(other)
    done = script(other, "ablate", str(folder), "--skip-doctor", **environment, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (other / "calls.txt").read_text().splitlines()
    assert calls == ["train --deepspeed ds_configs/zero3.json --out=r --resume auto", "evaluate --a"]
    assert "evaluate: done" in done.stdout
    failed = script(other, "ablate", str(folder), "--skip-doctor", **environment, SLURM_ARRAY_TASK_ID="1")
    assert failed.returncode == 1 and "ended with 3; not requeued" in failed.stderr
    assert len((other / "calls.txt").read_text().splitlines()) == 3  # no evaluation after a failed training
    beyond = script(other, "ablate", str(folder), **environment, SLURM_ARRAY_TASK_ID="2")
    assert beyond.returncode == 1 and f"{folder}/slurm/task-2.txt" in beyond.stderr


def test_an_ablation_needs_a_written_folder(root: Path, tmp_path: Path) -> None:
    for words in ([], [str(tmp_path)]):
        done = script(root, "ablate", "--dry-run", *words)
        assert done.returncode == 1 and "launchers/ablate.py --slurm" in done.stderr


def test_a_script_without_slurm_fails(root: Path) -> None:
    done = script(root, "prepare", "scanrefer")
    assert done.returncode == 1 and "start it with sbatch" in done.stderr


def test_fewer_ranks_than_gpus_fail(root: Path) -> None:
    done = script(root, "train", SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="1")
    assert done.returncode == 1 and "--ntasks-per-node=8" in done.stderr


@pytest.mark.parametrize(("code", "srun_code"), [(0, 0), (1, 1), (75, 0), (85, 0), (143, 0), (137, 137)])
def test_srun_does_not_kill_ranks_that_are_still_saving(root: Path, tmp_path: Path, code: int, srun_code: int) -> None:
    command = ["slurm/rank.sh", str(tmp_path), "bash", "-c", f"exit {code}"]
    done = subprocess.run(command, cwd=root, env=os.environ | JOB | {"TMPDIR": str(tmp_path)}, timeout=60, check=False)
    assert done.returncode == srun_code
    assert (tmp_path / "exit-3-gpu-2").read_text() == f"{code}\n"
    assert [path.name for path in tmp_path.glob("pid-*")] == []


def test_exit_codes_sh_is_up_to_date(root: Path) -> None:
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    lines = (root / "slurm" / "exit_codes.sh").read_text().splitlines()
    assignments = [line for line in lines if not line.startswith("#")]
    assert assignments == [f"EXIT_{name}={code}" for name, code in codes.items()]


def test_rank_sh_sets_torchrun_variables_and_a_private_kernel_folder(root: Path, tmp_path: Path) -> None:
    script_text = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $TORCH_EXTENSIONS_DIR $TRITON_CACHE_DIR"
    command = ["slurm/rank.sh", str(tmp_path), "bash", "-c", script_text]
    environment = os.environ | JOB | {"TMPDIR": str(tmp_path), "SLURM_RESTART_COUNT": "2"}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == f"3 4 1 2 {tmp_path}/w2r2-7-2/torch {tmp_path}/w2r2-7-2/triton"
    assert (tmp_path / "w2r2-7-2").stat().st_mode & 0o777 == 0o700


def test_a_kernel_folder_of_another_user_is_an_error(root: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folder")
    (tmp_path / "w2r2-7-0").mkdir()
    os.chown(tmp_path / "w2r2-7-0", 65534, 65534)
    command = ["slurm/rank.sh", str(tmp_path), "true"]
    environment = os.environ | JOB | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and str(tmp_path / "w2r2-7-0") in done.stderr


def test_rank_sh_continues_after_signals_and_records_the_exit_code(root: Path, tmp_path: Path) -> None:
    """scancel signals all processes of a step; the recorded exit code is the command's, not the shell's."""
    program = "trap 'echo got it' USR1 TERM; for i in $(seq 40); do sleep 0.05; done; exit 85"
    command = ["slurm/rank.sh", str(tmp_path), "bash", "-c", program]
    environment = os.environ | JOB | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE) as rank:
        while not list(tmp_path.glob("pid-*")):
            time.sleep(0.01)
        child = int((tmp_path / "pid-3-gpu-2").read_text())
        time.sleep(0.3)  # until the command has set its trap
        for number in (signal.SIGUSR1, signal.SIGTERM) * 4:
            rank.send_signal(number)
            os.kill(child, number)
            time.sleep(0.02)
        output, _ = rank.communicate(timeout=60)
    assert rank.returncode == 0 and "got it" in output
    assert (tmp_path / "exit-3-gpu-2").read_text() == "85\n"
