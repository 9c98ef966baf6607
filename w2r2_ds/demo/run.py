"""Run the whole pipeline without downloads: rooms, ZeRO-3 training of the tiny pair, diagnosis, export, report, table.

Every step is a command, which is logged before it is executed. A second run reuses finished steps.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.demo.results_table import METRICS, causality_line, parsed_share, results_table
from w2r2_ds.training.checkpoint.manifest import find_checkpoint, has_checkpoint, is_newer, is_trained
from w2r2_ds.training.deepspeed.process_group import free_port
from w2r2_ds.types.geometry import DemoGeometry
from w2r2_ds.utils.files.json_io import read_json_object
from w2r2_ds.utils.gpus import check_gpus
from w2r2_ds.utils.packages import import_problem

logger = logging.getLogger(__name__)

MIN_PARSED = {"point_map": 0.95, "vggt": 0.8}
"""Minimum share of answers that can be parsed, by `demo.geometry`; the demo fails below it.

The pair on VGGT is weaker."""
DIAGNOSE = ("--batch_size", "32", "--max_new_tokens", "32", "--causality_limit", "48")
"""Options of the diagnosis: answers of the tiny model have at most 24 tokens."""


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


def run_demo(geometry: DemoGeometry = "point_map") -> None:
    """Run all steps of the demo, in minutes; finished steps are reused.

    Args:
        geometry: `demo.geometry`; the results are in runs/demo, or runs/demo_vggt.
    """
    started = time.perf_counter()
    check_gpus(local_ranks=1)
    options = () if geometry == "point_map" else ("--demo.geometry", geometry)
    config = load_config(overrides=options)
    out = Path(config.out).parent
    adapter, scores = out / "adapter", out / "evaluation"
    run_command("python", "launchers/prepare.py", "demo", *options)
    if is_trained(config.out, config.train.steps):
        logger.info("reusing the trained run in %s", config.out)
    else:
        resume = ("--resume", "auto") if has_checkpoint(config.out) else ()
        port = ("--master_port", str(free_port()))  # the launcher's default port may be in use by another run
        zero3 = ("--deepspeed", "ds_configs/zero3.json")
        run_command("deepspeed", *port, "launchers/train.py", *zero3, *options, *resume)
    step = find_checkpoint(config.out)
    files = [scores / f"diagnosis-{task}.json" for task in METRICS]
    if all(is_newer(file, step) for file in files):
        logger.info("reusing the diagnosis in %s", scores)
    else:
        paths = ("--checkpoint", str(step), "--out", str(scores))
        run_command("python", "launchers/diagnose.py", *paths, *DIAGNOSE)
    if is_newer(adapter / "w2r2_card.json", step):
        logger.info("reusing the adapter in %s", adapter)
    else:
        if adapter.exists():
            shutil.rmtree(adapter)  # exported from an earlier checkpoint
        run_command("python", "launchers/export.py", "--checkpoint", config.out, "--out", str(adapter))
    write_report(config, scores)
    parsed = print_results(config, files, adapter, time.perf_counter() - started)
    if parsed < MIN_PARSED[geometry]:
        sys.exit(f"demo: only {parsed:.1%} of the answers parse; at least {MIN_PARSED[geometry]:.0%} should.")


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


def print_results(config: RunConfig, files: list[Path], adapter: Path, seconds: float) -> float:
    """Print the results table and paths; returns `parsed_share`.

    Args:
        config: run configuration of the demo.
        files: ``diagnosis-TASK.json`` of every task.
        adapter: folder of the exported adapter.
        seconds: duration of the demo.
    """
    results = [read_json_object(file) for file in files]
    console = Console(width=100)
    console.print(results_table(results))
    console.print("Scores times 100, with 95 % intervals over rooms that training has not used.", markup=False)
    if line := causality_line(results):
        console.print(line, markup=False, highlight=False)
    for label, path in (
        ("scenes", f"{config.data.root} (images in contact_sheets/)"),
        ("run", f"{config.out} (metrics.jsonl, checkpoints/)"),
        ("diagnosis", files[0].parent),
        ("adapter", adapter),
        ("report", report_file(config)),
    ):
        if label == "report" and not Path(path).is_file():
            continue
        console.print(f"{label:12} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"done in {seconds:.0f} s", markup=False, highlight=False)
    return parsed_share(results)
