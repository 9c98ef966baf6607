"""Run the whole pipeline without downloads: scenes, tiny model, ZeRO-3 training, evaluation, export, report, table.

Every step is a command, which is logged before it is executed. A second run reuses finished steps.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.evaluation.scoring import headline
from w2r2_ds.training.checkpoint.manifest import find_checkpoint, has_checkpoint, is_newer, is_trained
from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.utils.gpus import check_gpus
from w2r2_ds.utils.packages import import_problem

logger = logging.getLogger(__name__)

CAPTION = "tiny model: a test of the pipeline, not of the method"
MIN_PARSED = 0.95
"""Minimum share of answers that can be parsed; the demo fails below it."""
GEOMETRY_NAMES = {"fused": "2D + 3D", "zero": "2D only"}
METRICS = ("acc@0.25", "acc@0.5", "CIDEr@0.5", "BLEU-4@0.5", "ROUGE-L@0.5", "EM", "CIDEr", "ROUGE-L")
EVALUATIONS = [(task, geometry) for task in ("scanrefer", "scan2cap", "scanqa") for geometry in GEOMETRY_NAMES]


def run_command(*command: str) -> None:
    """Log and execute a command; exit if it fails."""
    logger.info("$ %s", " ".join(command))
    # "python" is this interpreter, with its packages; other programs are searched on PATH.
    program = sys.executable if command[0] == "python" else command[0]
    # The tensors are tiny: a second thread would cost more than it saves.
    defaults = {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed's launcher warns about a missing GPU
    done = subprocess.run([program, *command[1:]], env={**defaults, **os.environ})
    if done.returncode:
        sys.exit(f"demo: the command above failed with exit status {done.returncode}.")


def run_demo() -> None:
    """Run all steps of the demo in runs/demo, in minutes; finished steps are reused."""
    started = time.perf_counter()
    check_gpus(local_ranks=1)
    config = load_config()
    out = Path(config.out).parent
    adapter, scores = out / "adapter", out / "evaluation"
    run_command("python", "launchers/prepare.py", "demo")
    if is_trained(config.out, config.train.steps):
        logger.info("reusing the trained run in %s", config.out)
    else:
        resume = ("--resume", "auto") if has_checkpoint(config.out) else ()
        port = ("--master_port", str(free_port()))  # the launcher's default port may be in use by another run
        run_command("deepspeed", *port, "launchers/train.py", "--deepspeed", "ds_configs/zero3.json", *resume)
    step = find_checkpoint(config.out)
    for task, geometry in EVALUATIONS:
        file = scores / f"scores-{task}-{geometry}.json"
        if is_newer(file, step):
            logger.info("reusing %s", file)
            continue
        paths = ("--checkpoint", str(step), "--out", str(scores))
        options = ("--task", task, "--geometry", geometry, "--batch_size", "32")
        run_command("python", "launchers/evaluate.py", *paths, *options)
    if is_newer(adapter / "w2r2_card.json", step):
        logger.info("reusing the adapter in %s", adapter)
    else:
        if adapter.exists():
            shutil.rmtree(adapter)  # exported from an earlier checkpoint
        run_command("python", "launchers/export.py", "--checkpoint", config.out, "--out", str(adapter))
    write_report(config, scores)
    parsed = print_results(config, scores, adapter, time.perf_counter() - started)
    if parsed < MIN_PARSED:
        sys.exit(f"demo: only {parsed:.1%} of the answers parse; at least {MIN_PARSED:.0%} should.")


def report_file(config: RunConfig) -> Path:
    """The HTML page about the demo's run."""
    return Path(config.out).parent / "report.html"


def write_report(config: RunConfig, scores: Path) -> None:
    """Write the HTML page about the run; skipped, with a warning, if a package for it is not installed."""
    for package in ("plotly", "jinja2"):
        if problem := import_problem(package):
            logger.warning("no report: %s %s; pip install 'w2r2-ds[report]'", package, problem)
            return
    paths = ("--run", config.out, "--results", str(scores), "--out", str(report_file(config)))
    run_command("python", "launchers/report.py", *paths)


def print_results(config: RunConfig, scores: Path, adapter: Path, seconds: float) -> float:
    """Print the results table and paths; returns the smallest share of parsed answers over all evaluations.

    Args:
        config: run configuration of the demo.
        scores: folder with ``scores-TASK-GEOMETRY.json`` of all `EVALUATIONS`.
        adapter: folder of the exported adapter.
        seconds: duration of the demo.
    """
    table = Table(title=CAPTION, title_style="bold")
    for column in ("task", "geometry", "parsed", "samples", "scores"):
        table.add_column(column, justify="right" if column in ("parsed", "samples") else "left")
    shares, protocols = [], []
    for task, geometry in EVALUATIONS:
        results = json.loads((scores / f"scores-{task}-{geometry}.json").read_text())["protocols"]
        (name,) = results  # the task's default protocol
        shares.append(results[name]["parsed"])
        protocols += [name] if name not in protocols else []
        numbers = [
            f"{metric.removeprefix(name).strip()} {100 * value:.1f}"
            for metric, value in headline(results).items()
            if value is not None and metric.removeprefix(name).strip() in METRICS
        ]
        table.add_row(
            task, GEOMETRY_NAMES[geometry], f"{shares[-1]:.1%}", str(results[name]["count"]), ", ".join(numbers)
        )
    console = Console(width=100)
    console.print(table)
    console.print("all scores times 100; protocols:", ", ".join(protocols), markup=False, highlight=False)
    for label, path in (
        ("scenes", f"{config.data.root} (images in contact_sheets/)"),
        ("run", f"{config.out} (metrics.jsonl, checkpoints/)"),
        ("predictions", scores),
        ("adapter", adapter),
        ("report", report_file(config)),
    ):
        if label == "report" and not Path(path).is_file():
            continue
        console.print(f"{label:12} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"done in {seconds:.0f} s", markup=False, highlight=False)
    return min(shares)
