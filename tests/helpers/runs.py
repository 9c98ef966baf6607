"""A small world (scenes, warmed-up tiny models), and runs in it; shared by the slower tests.

`launch` starts the real launcher; `run_jobs` many short runs in one go, on forked ranks that all work through the same
list (`work`). ``python tests/helpers/runs.py record`` writes the golden losses again (see
tests/training/test_trainer.py).
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
DEMO = ROOT / "w2r2_ds" / "recipes" / "demo.yaml"
GOLDEN_LOSSES = ROOT / "tests" / "golden" / "losses" / "demo30.json"
TIMEOUT = 900
STEPS, SAVE_EVERY, GLOBAL_BATCH, MICRO_BATCH = 30, 5, 8, 4


@dataclass(frozen=True)
class World:
    """Two furnished training rooms and one for validation, so few that the tiny VLM begins to know them by heart.

    Then its teacher-forced answers overlap with the boxes, and the hinge of the objective is active for some samples.
    """

    folder: Path

    def arguments(self, out: Path, **changes: object) -> list[str]:
        """Options of `launchers/train.py`; ``changes`` are written ``train__steps=3``."""
        options = {
            "out": out,
            "demo.enabled": "false",
            "demo.warmup_steps": 100,
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
        return ["--config", str(DEMO), *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def world_folder(base: Path) -> Path:
    """Where the world lies: below ``base``, or where W2R2_TEST_WORLD says, so that it can be used again."""
    return Path(os.environ.get("W2R2_TEST_WORLD") or base / "world")


def make_world(folder: Path) -> World:
    """Write the scenes and the models, or reuse what the same options wrote."""
    from w2r2_ds.config.io import DEMO_RECIPE, load_config
    from w2r2_ds.demo.assets import prepare_models, prepare_sets
    from w2r2_ds.demo.synthetic.write import write_dataset

    world = World(folder)
    write_dataset(folder / "scenes", 0, 2, 1, (160, 120), 6)
    config = load_config(DEMO_RECIPE, world.arguments(folder / "unused"))
    prepare_sets(config)
    prepare_models(config)
    return world


def train_once(world: World) -> Path:
    """The run that most tests read: 30 steps on one rank, through the launcher."""
    out = world.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    done = launch(1, "launchers/train.py", ["--deepspeed", str(ZERO3), *world.arguments(out)])
    assert done.returncode == 0, done.stdout[-4000:]
    return out


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def launch(ranks: int, script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script with the `deepspeed` launcher on `ranks` processes; both output streams together."""
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
    """Output of forked ranks that each call ``work(folder)`` of a program; a rank that fails is an error."""
    status = fork_ranks(ranks, program, folder, free_port(), TIMEOUT)
    printed = (folder / "output.txt").read_text()
    assert status == 0, f"exit status {status}\n{printed[-6000:]}"
    return printed


def rewind(run: Path, copy: Path, step: int) -> None:
    """Copy a run as it was when it was killed after the checkpoint of `step`; later lines of metrics stay."""
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
        name: of the run; its folder is named after it.
        arguments: of `launchers/train.py`, with ``--deepspeed``.
        stop_after: optimizer steps after which to stop, without the pass_order knowing.
        dry_run: False skips the dry run.
        nan_call: forward, from 1, in which rank 1's first sample gets a NaN loss; 0 for none.
        rewind: run, copy and step for `rewind`, done before the job.
        disturb: what happens before the checkpoint of which step: "full" lets no file of rank 1 grow beyond 1000 bytes
            during it, "taken over" lets another start claim the run; ("", 0) for nothing.
        scores: what the validations give, in order, instead of what the answers are worth; empty for the real scores.
    """

    name: str
    arguments: list[str]
    stop_after: int = 0
    dry_run: bool = True
    nan_call: int = 0
    rewind: tuple[str, str, int] | None = None
    disturb: tuple[str, int] = ("", 0)
    scores: tuple[float, ...] = ()


def run_jobs(ranks: int, folder: Path, jobs: list[Job]) -> dict[str, list[dict[str, Any]]]:
    """Run jobs one after the other in the same processes; per job, what each rank reports.

    A report has ``error`` (the exception's type and text, or None), ``updates`` (optimizer steps the engine took) and
    ``injected`` (id of the sample that got a NaN loss, or None).
    """
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([vars(job) for job in jobs]))
    run_ranks(ranks, Path(__file__), folder)
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {job.name: [report[job.name] for report in reports] for job in jobs}


class Stopped(Exception):
    """Raised to end a run early."""


def work(folder: Path) -> None:
    """Process of each rank of `run_jobs`."""
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
        with changed(job, report):
            try:
                train(*read_arguments(job.arguments), AnswerValidation)
            except Stopped:
                pass
            except (ValueError, FloatingPointError) as error:
                report["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        gc.freeze()  # what is left stays for ever, and every engine collects garbage among all that is not frozen
        dist.barrier()
        reports[job.name] = report
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


@contextlib.contextmanager
def changed(job: Job, report: dict[str, Any]) -> Iterator[None]:
    """The loop with the changes that a job asks for; fills in the report."""
    import torch
    import torch.distributed as dist

    from w2r2_ds.evaluation import validator
    from w2r2_ds.training import trainer
    from w2r2_ds.training.checkpoint.ownership import OwnershipToken
    from w2r2_ds.training.step import W2R2Step

    real_score = validator.score
    values = iter(job.scores)

    def score(records: Any) -> dict[str, float | None]:
        found = real_score(records)
        if all(record["tokens"] for record in records):  # labels, which are scored before the first step, have none
            found |= {"scanrefer/acc@0.25": next(values)}
        return found

    saved = trainer.train_step, trainer.dry_run, W2R2Step.forward
    save_checkpoint = trainer.save_checkpoint
    calls = 0

    def train_step(run: Any, micro_batches: Any, step: int) -> Any:
        report["updates"] = run.engine.global_steps
        if job.stop_after and report["updates"] - run.start == job.stop_after:
            raise Stopped
        try:
            return saved[0](run, micro_batches, step)
        finally:
            report["updates"] = run.engine.global_steps

    def forward(self: Any, batch: Any, mode: Any = "loss", **more: Any) -> Any:
        nonlocal calls
        if mode != "loss":
            return saved[2](self, batch, mode, **more)
        calls += 1
        loss, stats = saved[2](self, batch, mode, **more)
        if calls == job.nan_call and dist.get_rank() == 1:
            report["injected"] = batch.ids[0]
            stats[0, 0] = torch.nan
            loss = loss * torch.nan
        return loss, stats

    def save_disturbed(engine: Any, config: Any, info: Any, token: Any) -> Any:
        what, step = job.disturb
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if info.step == step and what == "taken over" and dist.get_rank() == 0:
            OwnershipToken.claim(config.out)
        if info.step == step and what == "full" and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # EFBIG; Python ignores SIGXFSZ
        try:
            return save_checkpoint(engine, config, info, token)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    trainer.train_step = train_step  # type: ignore[assignment]
    trainer.save_checkpoint = save_disturbed
    W2R2Step.forward = forward  # type: ignore[method-assign]
    if job.scores:
        validator.score = score
    if not job.dry_run:
        trainer.dry_run = lambda run, batch: None
    try:
        yield
    finally:
        trainer.train_step, trainer.dry_run, W2R2Step.forward = saved  # type: ignore[method-assign]
        trainer.save_checkpoint = save_checkpoint
        validator.score = real_score


def record() -> None:
    """Make the world and the run afresh and write the golden losses."""
    import torch

    from w2r2_ds.utils.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        metrics = read_metrics(train_once(make_world(Path(folder) / "world")))
    kept = {name: [line[name] for line in metrics] for name in ("loss", "above_mu", "s_short")}
    about = {"versions": versions(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else GOLDEN_LOSSES
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about | kept, indent=1) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    record()
