"""Command lines of the runs of an ablation: on this machine, and in a Slurm job array."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from w2r2_ds.diagnostics.ablation.plan import Plan, Run
from w2r2_ds.utils.files import atomic_io
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.files.output_folder import make_folder

TASKS = "slurm"
"""Folder below OUT with the commands of each task of a Slurm array."""


@dataclass(frozen=True)
class Devices:
    """Devices of one run at a time.

    Attributes:
        ranks: number of ranks.
        gpus: value of CUDA_VISIBLE_DEVICES; empty on a machine without GPUs.
    """

    ranks: int
    gpus: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the run's processes."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": self.gpus}
        return {"DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Step:
    """A command of a run.

    Attributes:
        name: ``train`` or ``evaluate``.
        words: the command line.
    """

    name: str
    words: Sequence[str]


def remaining_steps(plan: Plan, run: Run, devices: Devices, port: Callable[[], int]) -> list[Step]:
    """Commands that the run still needs: training if it is not finished, and one for all evaluations without scores.

    Args:
        plan: the ablation.
        run: one of its runs.
        devices: where it runs.
        port: function that returns a free port for the launcher; its default port may be in use by another run.
    """
    steps = []
    names = list(plan.evaluations) if plan.needs_training(run) else plan.missing_evaluations(run)
    if plan.needs_training(run):
        options = ["--deepspeed", plan.deepspeed, *plan.words_of_training(run), "--resume=auto"]
        steps.append(Step("train", [*launcher(devices, port()), "launchers/train.py", *options]))
    if names:
        start = ["python"] if devices.ranks == 1 else launcher(devices, port())
        steps.append(Step("evaluate", [*start, "launchers/evaluate.py", *plan.words_of_evaluations(run, names)]))
    return steps


def launcher(devices: Devices, port: int) -> list[str]:
    """Start of a command line that runs a script on the devices of a run."""
    # With CUDA_VISIBLE_DEVICES the launcher starts a rank per GPU, and ignores the variable if --num_gpus is given.
    ranks = [] if devices.gpus else ["--num_gpus", str(devices.ranks)]
    return ["deepspeed", *ranks, "--master_port", str(port)]


def write_array(plan: Plan) -> list[int]:
    """Write the commands of every run for slurm/ablate.sbatch, which needs no Python.

    OUT/slurm/tasks.json    folders of the runs; the number of a task is the index of its run
              task-N.txt    a command per line, its words separated by tabs: ``train`` and options, then ``evaluate``
                            and options

    A run keeps its number when arms or seeds are added: tasks of an array that is waiting read their files later.

    Returns:
        The numbers of the tasks of unfinished runs, in the order of the plan.

    Raises:
        ValueError: a word contains a tab or a newline.
    """
    folder = plan.out / TASKS
    make_folder(folder)
    file = folder / "tasks.json"
    numbers = {name: index for index, name in enumerate(read_json_object(file)["runs"] if file.is_file() else [])}
    for run in plan.runs:
        numbers.setdefault(str(run.folder.relative_to(plan.out)), len(numbers))
    atomic_io.replace(file, json.dumps({"runs": list(numbers)}, indent=2) + "\n")
    unfinished = []
    for run in plan.runs:
        lines = [["train", "--deepspeed", plan.deepspeed, *plan.words_of_training(run)]]
        lines.append(["evaluate", *plan.words_of_evaluations(run, plan.evaluations)])
        for word in (word for line in lines for word in line):
            if not word or any(character in word for character in "\t\n"):
                raise ValueError(f"--slurm: the option {word!r} is empty or contains a tab or a newline.")
        number = numbers[str(run.folder.relative_to(plan.out))]
        atomic_io.replace(folder / f"task-{number}.txt", "".join("\t".join(line) + "\n" for line in lines))
        if not plan.is_finished(run):
            unfinished.append(number)
    return unfinished


def array_command(plan: Plan, tasks: Sequence[int], ranks: int, gpus: bool) -> str:
    """The sbatch command of the array.

    Args:
        plan: the ablation.
        tasks: numbers of the tasks, at least one.
        ranks: ranks of a run.
        gpus: whether every rank has a GPU.
    """
    resources = [f"--ntasks-per-node={ranks}", *([f"--gpus-per-node={ranks}"] if gpus else [])]
    return shlex.join(["sbatch", f"--array={compact(tasks)}", *resources, "slurm/ablate.sbatch", str(plan.out)])


def compact(numbers: Sequence[int]) -> str:
    """Numbers as sbatch reads them, consecutive ones as ranges: 5, 0, 1, 2 -> ``0-2,5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
