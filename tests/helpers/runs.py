"""Training runs on synthetic scenes with tiny models, shared by the slow tests.

`launch` runs a script with DeepSpeed's launcher. `run_jobs` runs a list of short trainings one after the other in the
same forked ranks (`work`). ``python tests/helpers/runs.py record`` writes the golden losses of
tests/training/test_trainer.py.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_server import ROOT, environment, fork_ranks
from w2r2_ds.training.deepspeed.process_group import free_port

ZERO3 = ROOT / "ds_configs" / "zero3.json"
RECIPE = ROOT / "tests" / "helpers" / "tiny_recipe.yaml"
GOLDEN_LOSSES = ROOT / "tests" / "golden" / "losses" / "demo30.json"
TIMEOUT = 900
STEPS, SAVE_EVERY, GLOBAL_BATCH, MICRO_BATCH = 30, 5, 8, 4


@dataclass(frozen=True)
class World:
    """Folder of scenes and models: two training rooms, one validation room, a warmed-up tiny VLM and a tiny VGGT.

    There are so few rooms that the tiny VLM memorises some answers. Then its teacher-forced answers overlap with the
    boxes, and the hinge of the objective is active for some samples.
    """

    folder: Path

    def arguments(self, out: Path, **changes: object) -> list[str]:
        """Command line of launchers/train.py; ``train__steps=3`` in `changes` becomes ``--train.steps 3``."""
        options = {
            "out": out,
            "data.root": self.folder / "scenes",
            "data.train": "[{path: prepared/scanrefer/train}]",
            "data.val": "[{path: prepared/scanrefer/val}]",
            "demo.frames": 2,
            "data.frame_width": 56,
            "model.vlm": self.folder / "vlm",
            "model.geometry.path": self.folder / "vggt",
            "objective.mu": 0.0,
            "objective.decode_gap_every": 0,
            "train.steps": STEPS,
            "train.global_batch": GLOBAL_BATCH,
            "train.micro_batch": MICRO_BATCH,
            "train.save_every": SAVE_EVERY,
            "train.keep_last": 2,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return [
            "--config",
            str(RECIPE),
            *(text for name, value in options.items() for text in (f"--{name}", str(value))),
        ]


def world_folder(base: Path) -> Path:
    """The environment variable W2R2_TEST_WORLD (a folder to reuse in later test runs), else ``base/world``."""
    return Path(os.environ.get("W2R2_TEST_WORLD") or base / "world")


def make_world(folder: Path) -> World:
    """Write the scenes and the models, or reuse those of the same options."""
    from w2r2_ds.config.io import load_config
    from w2r2_ds.demo.synthetic.write import write_dataset
    from warm_up import make_tiny_models, prepare_tiny_sets

    world = World(folder)
    write_dataset(folder / "scenes", 0, 2, 1, (160, 120), 6)
    config = load_config(RECIPE, world.arguments(folder / "unused"))
    prepare_tiny_sets(config)
    make_tiny_models(config)
    return world


def train_once(world: World) -> Path:
    """Train 30 steps on one rank with DeepSpeed's launcher; returns the run folder, with its output, for most tests."""
    out = world.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    shown = {"train__samples_every": SAVE_EVERY, "train__report": "true"}
    done = launch(1, "launchers/train.py", ["--deepspeed", str(ZERO3), *world.arguments(out, **shown)])
    assert done.returncode == 0, done.stdout[-4000:]
    (out / "output.txt").write_text(done.stdout)
    return out


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch(ranks: int, script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script with the `deepspeed` launcher on `ranks` ranks; standard output and error are in `stdout`."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), script]
    return subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
        check=False,
    )


def run_ranks(ranks: int, program: Path, folder: Path) -> str:
    """Call ``work(folder)`` of a program on forked ranks; returns their output.

    Raises:
        AssertionError: a rank failed.
    """
    status = fork_ranks(ranks, program, folder, free_port(), TIMEOUT)
    printed = (folder / "output.txt").read_text()
    assert status == 0, f"exit status {status}\n{printed[-6000:]}"
    return printed


def rewind(run: Path, copy: Path, step: int) -> None:
    """Copy a run and delete its checkpoints after `step`, as if it was killed then; all metrics stay."""
    shutil.copytree(run, copy)
    checkpoints = copy / "checkpoints"
    for later in checkpoints.glob("step-??????"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    (checkpoints / "latest").write_text(f"step-{step:06d}\n")


@dataclass(frozen=True)
class Job:
    """One short run of `run_jobs`.

    Attributes:
        name: name of the job in the reports.
        arguments: command line of launchers/train.py, with ``--deepspeed``.
        stop_after: number of optimizer steps after which to stop; the LR schedule stays that of `train.steps`.
        dry_run: False skips the dry run.
        nan_call: number of the forward, from 1, in which rank 1's first sample gets a NaN loss; 0 for none.
        nan_gradient: in that forward the gradients are NaN instead, and the loss is finite.
        rewind: arguments of `rewind`, which is called before the job.
        save_fault: fault and step of the checkpoint it occurs in. ``full``: files of rank 1 cannot grow beyond 1000
            bytes. ``taken over``: another process claims the run. ``("", 0)`` for none.
        scores: acc@0.25 of each validation, in order, instead of the computed scores; empty for the computed ones.
    """

    name: str
    arguments: list[str]
    stop_after: int = 0
    dry_run: bool = True
    nan_call: int = 0
    nan_gradient: bool = False
    rewind: tuple[str, str, int] | None = None
    save_fault: tuple[str, int] = ("", 0)
    scores: tuple[float, ...] = ()


def run_jobs(ranks: int, folder: Path, jobs: list[Job]) -> dict[str, list[dict[str, Any]]]:
    """Run jobs one after the other in the same processes; returns job name -> report of each rank.

    A report has ``error`` (type and text of the exception, or None), ``updates`` (number of optimizer steps) and
    ``injected`` (id of the sample with a NaN, or None).
    """
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([vars(job) for job in jobs]))
    run_ranks(ranks, Path(__file__), folder)
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {job.name: [report[job.name] for report in reports] for job in jobs}


class Stopped(Exception):
    """Raised to end a run early."""


def work(folder: Path) -> None:
    """Entry point of a rank of `run_jobs`."""
    import deepspeed
    import torch.distributed as dist

    from w2r2_ds.commands.train import read_arguments
    from w2r2_ds.evaluation.validator import AnswerValidation
    from w2r2_ds.training.deepspeed.process_group import skip_shm_build
    from w2r2_ds.training.trainer import train
    from w2r2_ds.utils.logging import setup_logging

    setup_logging()
    skip_shm_build()
    deepspeed.init_distributed()
    reports = {}
    for raw in json.loads((folder / "jobs.json").read_text()):
        job = Job(**raw)
        if job.rewind and dist.get_rank() == 0:
            run, copy, step = job.rewind
            rewind(Path(run), Path(copy), step)
        dist.barrier()
        report: dict[str, Any] = {"error": None, "updates": 0, "injected": None}
        with patched(job, report):
            try:
                train(*read_arguments(job.arguments), AnswerValidation)
            except Stopped:
                pass
            except (ValueError, FloatingPointError) as error:
                report["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        gc.freeze()  # remaining objects are never freed; DeepSpeed's collections then skip them
        dist.barrier()
        reports[job.name] = report
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


@contextlib.contextmanager
def patched(job: Job, report: dict[str, Any]) -> Iterator[None]:
    """Patch the trainer with the changes of a job, and fill in its report."""
    import torch
    import torch.distributed as dist

    from w2r2_ds.evaluation import validator
    from w2r2_ds.training import trainer
    from w2r2_ds.training.checkpoint.ownership import OwnershipToken
    from w2r2_ds.training.step import W2R2Step

    stock_score = validator.score
    values = iter(job.scores)

    def score(records: Any) -> dict[str, float | None]:
        found = stock_score(records)
        if all(record["tokens"] for record in records):  # False for the labels, which are scored before step 1
            found |= {"scanrefer/acc@0.25": next(values)}
        return found

    stock = trainer.train_step, trainer.dry_run, W2R2Step.forward
    save_checkpoint = trainer.save_checkpoint
    calls = 0

    def train_step(run: Any, micro_batches: Any, step: int) -> Any:
        report["updates"] = run.engine.global_steps
        if job.stop_after and report["updates"] - run.start_step == job.stop_after:
            raise Stopped
        try:
            return stock[0](run, micro_batches, step)
        finally:
            report["updates"] = run.engine.global_steps

    def forward(self: Any, batch: Any, mode: Any = "loss", **more: Any) -> Any:
        nonlocal calls
        if mode != "loss":
            return stock[2](self, batch, mode, **more)
        calls += 1
        loss, stats = stock[2](self, batch, mode, **more)
        if calls == job.nan_call and dist.get_rank() == 1:
            report["injected"] = batch.ids[0]
            if job.nan_gradient:
                loss.register_hook(lambda gradient: gradient * torch.nan)
            else:
                stats[0, 0] = torch.nan
                loss = loss * torch.nan
        return loss, stats

    def save_with_fault(engine: Any, config: Any, info: Any, token: Any) -> Any:
        fault, step = job.save_fault
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if info.step == step and fault == "taken over" and dist.get_rank() == 0:
            OwnershipToken.claim(config.out)
        if info.step == step and fault == "full" and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes fail with EFBIG; Python ignores SIGXFSZ
        try:
            return save_checkpoint(engine, config, info, token)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    trainer.train_step = train_step  # type: ignore[assignment]
    trainer.save_checkpoint = save_with_fault
    W2R2Step.forward = forward  # type: ignore[method-assign]
    if job.scores:
        validator.score = score
    if not job.dry_run:
        trainer.dry_run = lambda run, batch: None
    try:
        yield
    finally:
        trainer.train_step, trainer.dry_run, W2R2Step.forward = stock  # type: ignore[method-assign]
        trainer.save_checkpoint = save_checkpoint
        validator.score = stock_score


def record() -> None:
    """Train in a new world and write the golden losses."""
    import torch

    from w2r2_ds.utils.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        metrics = read_metrics(train_once(make_world(Path(folder) / "world")))
    losses = {name: [line[name] for line in metrics] for name in ("loss", "above_mu", "s_short")}
    environment_record = {"versions": versions(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else GOLDEN_LOSSES
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(environment_record | losses, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    record()
