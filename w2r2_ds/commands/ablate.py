"""Ablations: ``w2r2 ablate --config RECIPE --grid '{objective.lambda_det: [0, 0.5, 1.5]}' --seeds 5 --out FOLDER``.

Every run is a training and its evaluations, in processes of their own. The same command continues an interrupted
ablation and repeats nothing that is finished.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from w2r2_ds.commands.ablate_options import ablation_parser, make_plan
from w2r2_ds.commands.common import command_words
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.commands.evaluate import parsed_options
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED
from w2r2_ds.utils.logging import stdout_to_stderr

if TYPE_CHECKING:
    from w2r2_ds.diagnostics.ablation.plan import Plan

logger = logging.getLogger(__name__)

LEVEL = 0.95
"""Coverage of the intervals."""


@reports_errors("ablate")
def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 if a run failed."""
    options, train_words = ablation_parser().parse_known_args(command_words(args))
    for word in train_words:
        for name in ("--resume", "--train.seed"):
            if word.partition("=")[0] == name:
                raise ValueError(f"{name} is set for every run; use --seeds for seeds, and omit --resume.")
    return run(options, train_words)


def run(options: argparse.Namespace, train_words: Sequence[str]) -> int:
    """Check all arms, run what is unfinished, and compare; returns the exit code.

    Args:
        options: values of `ablation_parser`.
        train_words: options of w2r2 train for all runs.
    """
    # Imported after the command line is parsed: these import torch.
    from w2r2_ds.diagnostics.ablation.identity import check_identity, shared_values

    if sum((options.dry_run, options.slurm, options.table_only)) > 1:
        raise ValueError("--dry_run, --slurm and --table_only exclude each other; pass one of them.")
    plan, base, arms = make_plan(options, train_words)
    if options.dry_run:
        return print_commands(plan, options)
    with stdout_to_stderr():
        data = prepare(plan, base, arms)
    check_identity(plan.out, shared_values(base, plan.deepspeed, plan.plugins), plan.evaluations, data)
    if options.slurm:
        return print_array(plan, options)
    failures = [] if options.table_only else run_here(plan, options)
    compare_arms(plan, options, failures)
    return FAILED if failures else DONE


def prepare(plan: Plan, base: RunConfig, arms: Sequence[RunConfig]) -> dict[str, str]:
    """Make the demo's data if the recipe is the demo, and check the sets; returns digests of sets and weights.

    Raises:
        ValueError: a set is not prepared, or an evaluation has not exactly one task or a number that is too small.
    """
    from w2r2_ds.demo.assets import prepare_demo
    from w2r2_ds.diagnostics.ablation.identity import data_digests, weights_digests
    from w2r2_ds.evaluation.datasets import find_sets
    from w2r2_ds.evaluation.options import EvaluationOptions

    if base.demo.enabled:
        prepare_demo(base)
    for name, chosen in plan.evaluations.items():
        try:
            evaluation = EvaluationOptions(**parsed_options(chosen))
            find_sets(base.data, evaluation.task, evaluation.data)
        except ValueError as error:
            raise ValueError(f"--evaluations: {name}: {error}") from None
    return data_digests(arms, plan.evaluations) | weights_digests(arms)


def print_commands(plan: Plan, options: argparse.Namespace) -> int:
    """Print the commands of all unfinished runs to standard output."""
    from w2r2_ds.diagnostics.ablation.commands import Devices, remaining_steps

    for each in plan.runs:
        for step in remaining_steps(plan, each, Devices(options.ranks), lambda: 29500):
            print(shlex.join(step.words))
    return DONE


def print_array(plan: Plan, options: argparse.Namespace) -> int:
    """Write the files of slurm/ablate.sbatch and print the sbatch command, if a run is not finished."""
    from w2r2_ds.diagnostics.ablation.commands import array_command, write_array

    tasks = write_array(plan)
    logger.info("%d of %d runs are finished", len(plan.runs) - len(tasks), len(plan.runs))
    if tasks:
        # Not by the GPUs of this machine, which is a login node.
        print(array_command(plan, tasks, options.ranks, os.environ.get("DS_ACCELERATOR") != "cpu"))
    return DONE


def run_here(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Run all unfinished runs on this machine; returns a description of each that failed."""
    import torch

    from w2r2_ds.diagnostics.ablation.runner import LocalRunner, local_devices
    from w2r2_ds.utils.gpus import check_gpus

    check_gpus(local_ranks=options.ranks)
    count = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = named[:count] if len(named) >= count > 0 and named[0] else [str(index) for index in range(count)]
    runs = [each for each in plan.runs if not plan.is_finished(each)]
    logger.info("%d of %d runs are finished", len(plan.runs) - len(runs), len(plan.runs))
    if not runs:
        return []
    devices = local_devices(options.ranks, options.jobs, gpus, len(os.sched_getaffinity(0)))
    return [str(failure) for failure in LocalRunner(plan, devices[: len(runs)]).run(runs)]


def compare_arms(plan: Plan, options: argparse.Namespace, failures: Sequence[str]) -> None:
    """Print the tables and write results.json and plots.html."""
    from rich.console import Console

    from w2r2_ds.diagnostics.ablation.comparison import compare
    from w2r2_ds.diagnostics.ablation.output import print_results, write_plots, write_results
    from w2r2_ds.diagnostics.ablation.results import read_results

    rows = compare(read_results(plan, tuple(options.metrics)), plan.baseline, LEVEL)
    files = [write_results(plan, rows, failures, LEVEL)]
    if rows:
        print_results(rows, plan.baseline, LEVEL)
        plots = write_plots(plan, rows, LEVEL)
        files += [plots] if plots else []
    console = Console(width=10_000)
    unfinished = [each.name for each in plan.runs if not plan.is_finished(each)]
    if unfinished:
        console.print(
            f"{len(unfinished)} of {len(plan.runs)} runs are not finished:", "; ".join(unfinished), markup=False
        )
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    console.print("results:", ", ".join(map(str, files)), markup=False, highlight=False)
