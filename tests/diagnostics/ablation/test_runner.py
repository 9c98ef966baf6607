"""Runs in processes: several at once, failures, resumption, signals. The launchers are stubs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ablation_runs import FUSED, make_plan, write_checkpoint, write_scores
from w2r2_ds.diagnostics.ablation.commands import Devices, array_command, compact, remaining_steps, write_array
from w2r2_ds.diagnostics.ablation.plan import Plan
from w2r2_ds.diagnostics.ablation.runner import LocalRunner, local_devices

GRID = {"objective.lambda_det": [0, 1, 2]}
STUB = """
import os, shutil, signal, sys, time
from pathlib import Path
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
arm = options.get("objective.lambda_det", "")
with open("calls.txt", "a") as file:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    file.write(f"{Path(sys.argv[0]).stem} {options['out']} {gpus} {accelerator} {os.environ.get('STUB_PORT', '')}\\n")
if Path(f"fail-{arm}").exists():
    sys.exit("stub: out of memory")
if Path("wait").exists():
    def stop(*_):
        Path(options["out"], "stopped").write_text("")
        sys.exit(143)
    signal.signal(signal.SIGINT, stop)
    Path(options["out"], "waiting").write_text("")
    time.sleep(60)
together = Path("together")
if together.exists() and arm:  # wait for the other runs, which must run at the same time
    (together / arm).write_text("")
    until = time.monotonic() + 60
    while len(list(together.iterdir())) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
shutil.copytree(STUB_RESULT, options["out"], dirs_exist_ok=True)
"""
DEEPSPEED = """#!/bin/sh
while :; do
    case $1 in launchers/*) break ;; --master_port) export STUB_PORT=$2 ;; esac
    shift
done
exec {python} "$@"
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with stubs of the launchers and of the program deepspeed."""
    trained, scored = tmp_path / "trained", tmp_path / "scored"
    write_checkpoint(trained)
    for name in ("fused", "zero"):
        write_scores(scored / name, [True, False])
    (tmp_path / "launchers").mkdir()
    for name, result in (("train", trained), ("evaluate", scored)):
        (tmp_path / "launchers" / f"{name}.py").write_text(f"STUB_RESULT = {str(result)!r}\n{STUB}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").write_text(DEEPSPEED.format(python=sys.executable))
    (tmp_path / "bin" / "deepspeed").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls() -> list[list[str]]:
    return [line.split(" ") for line in Path("calls.txt").read_text().splitlines()]


def run_all(plan: Plan, devices: list[Devices]) -> list[str]:
    return [str(failure) for failure in LocalRunner(plan, devices).run(plan.runs)]


def test_runs_are_trained_and_evaluated_once(repository: Path) -> None:
    """All evaluations of a run are one command."""
    evaluations = {**FUSED, "zero": {"geometry": "zero"}}
    plan = make_plan(Path("out"), [GRID], [0, 1], evaluations=evaluations)
    assert run_all(plan, [Devices(1)]) == []
    assert all(plan.is_finished(run) for run in plan.runs)
    expected = [call for run in plan.runs for call in (f"train {run.folder}", f"evaluate {run.folder}/evaluation")]
    assert [" ".join(call[:2]) for call in calls()] == expected
    assert {call[3] for call in calls()} == {"cpu"}
    log = (plan.runs[0].folder / "log.txt").read_text()
    assert log.count("$ deepspeed --num_gpus 1 --master_port") == 1 and "$ python launchers/evaluate.py" in log
    Path("calls.txt").write_text("")
    assert run_all(plan, [Devices(1)]) == []
    assert calls() == []
    shutil.rmtree(plan.runs[2].folder / "evaluation" / "zero")
    (step,) = remaining_steps(plan, plan.runs[2], Devices(1), lambda: 1234)
    assert step.words[2:] == plan.words_of_evaluations(plan.runs[2], ["zero"])


def test_runs_at_once_have_their_own_gpus_and_ports(repository: Path) -> None:
    """Every stub waits until all three run."""
    (repository / "together").mkdir()
    plan = make_plan(Path("out"), [GRID])
    assert run_all(plan, [Devices(2, "0,1"), Devices(2, "2,3"), Devices(2, "4,5")]) == []
    trained = [call for call in calls() if call[0] == "train"]
    assert {call[2] for call in trained} == {"0,1", "2,3", "4,5"} and {call[3] for call in trained} == {""}
    assert len({call[4] for call in calls()}) == 6


def test_a_failed_run_does_not_stop_the_others_and_is_repeated(repository: Path) -> None:
    (repository / "fail-1").touch()
    plan = make_plan(Path("out"), [GRID])
    (failure,) = run_all(plan, [Devices(1)])
    assert "lambda_det=1 seed 0: train ended with 1" in failure and "stub: out of memory" in failure
    assert str(plan.runs[1].folder / "log.txt") in failure
    assert [plan.is_finished(run) for run in plan.runs] == [True, False, True]
    (repository / "fail-1").unlink()
    Path("calls.txt").write_text("")
    assert run_all(plan, [Devices(1)]) == []
    assert [call[0] for call in calls()] == ["train", "evaluate"]


def test_an_interrupt_stops_all_runs_and_starts_no_other(repository: Path) -> None:
    (repository / "wait").touch()
    plan = make_plan(Path("out"), [GRID])
    first, second, third = (run.folder for run in plan.runs)

    def interrupt() -> None:
        while not all((folder / "waiting").exists() for folder in (first, second)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        LocalRunner(plan, [Devices(1), Devices(1)]).run(plan.runs)
    thread.join()
    assert (first / "stopped").exists() and (second / "stopped").exists()
    assert not third.exists() or not (third / "waiting").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_program_that_does_not_exist_is_an_error(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="deepspeed"):
        run_all(make_plan(Path("out"), [GRID]), [Devices(1)])


def test_devices() -> None:
    assert (
        local_devices(1, 0, [], 4) == [Devices(1)] * 4
        and local_devices(2, 0, [], 5) == [Devices(2)] * 2
        and local_devices(4, 0, [], 2) == [Devices(4)]
    )
    assert local_devices(1, 3, [], 2) == [Devices(1)] * 3
    assert local_devices(2, 0, ["0", "1", "5", "6", "7"], 64) == [Devices(2, "0,1"), Devices(2, "5,6")]
    assert local_devices(1, 1, ["3", "4"], 64) == [Devices(1, "3")]
    for ranks, jobs in ((0, 0), (1, -1), (3, 0), (1, 3)):
        with pytest.raises(ValueError, match="--ranks"):
            local_devices(ranks, jobs, ["0", "1"], 8)


def test_several_ranks_evaluate_with_the_launcher(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [GRID])
    train, evaluate = remaining_steps(plan, plan.runs[0], Devices(2, "2,3"), lambda: 1234)
    assert list(train.words)[:3] == list(evaluate.words)[:3] == ["deepspeed", "--master_port", "1234"]
    assert train.words[-1] == "--resume=auto"
    train, _ = remaining_steps(plan, plan.runs[0], Devices(2), lambda: 1234)
    assert list(train.words)[:3] == ["deepspeed", "--num_gpus", "2"]


def test_commands_of_a_job_array(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "a b", [GRID], evaluations={**FUSED, "zero": {"geometry": "zero"}})
    assert write_array(plan) == [0, 1, 2]
    file = plan.out / "slurm" / "task-1.txt"
    train, evaluate = (line.split("\t") for line in file.read_text().splitlines())
    assert train == ["train", "--deepspeed", "ds_configs/zero3.json", *plan.words_of_training(plan.runs[1])]
    assert evaluate == ["evaluate", *plan.words_of_evaluations(plan.runs[1], ["fused", "zero"])]
    write_checkpoint(plan.runs[1].folder)
    for name in plan.evaluations:
        write_scores(plan.runs[1].folder / "evaluation" / name, [True])
    assert write_array(plan) == [0, 2]


def test_a_run_keeps_its_task_when_the_grid_changes(tmp_path: Path) -> None:
    """Tasks of a waiting array read their files later: task 1 must not train another arm."""
    plan = make_plan(tmp_path, [{"objective.lambda_det": [0, 1]}], [0, 1])
    write_array(plan)
    files = {file.name: file.read_text() for file in (tmp_path / "slurm").glob("task-*.txt")}
    assert len(files) == 4
    wider = make_plan(tmp_path, [{"objective.lambda_det": [2, 0, 1]}], [0, 1])
    assert write_array(wider) == [4, 0, 1, 5, 2, 3]
    assert {name: (tmp_path / "slurm" / name).read_text() for name in files} == files
    assert f"--out={wider.runs[0].folder}" in (tmp_path / "slurm" / "task-4.txt").read_text().split()
    assert write_array(make_plan(tmp_path, [{"objective.lambda_det": [1]}], [1])) == [3]
    assert {name: (tmp_path / "slurm" / name).read_text() for name in files} == files


def test_the_sbatch_command(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "a b", [GRID])
    resources = ["--ntasks-per-node=4", "--gpus-per-node=4"]
    expected = ["sbatch", "--array=0,2-3", *resources, "slurm/ablate.sbatch", str(plan.out)]
    assert shlex.split(array_command(plan, [3, 0, 2], 4, gpus=True)) == expected
    assert "gpus" not in array_command(plan, [0], 1, gpus=False)


def test_a_tab_in_an_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--slurm"):
        write_array(make_plan(tmp_path, [{"model.vlm": "a\tb"}]))


def test_ranges_of_tasks() -> None:
    assert [compact(tasks) for tasks in ([], [3], [1, 0, 2], [0, 2, 3, 7])] == ["", "3", "0-2", "0,2-3,7"]


def test_stubs_are_python(repository: Path) -> None:
    """The stubs themselves: a wrong word order in the launcher would make other tests pass for a wrong reason."""
    out = repository / "x"
    command = ["deepspeed", "--master_port", "5", "launchers/train.py", f"--out={out}"]
    assert subprocess.run(command, check=False).returncode == 0
    assert calls()[-1] == ["train", str(out), os.environ.get("CUDA_VISIBLE_DEVICES", ""), "", "5"]
