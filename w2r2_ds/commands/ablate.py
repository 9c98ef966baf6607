"""Ablations: ``w2r2 ablate --config RECIPE --grid '{objective.lambda_det: [0, 0.5, 1.5]}' --seeds 5 --out FOLDER``.

Every run is a training and its evaluations, in processes of their own. The same command continues an interrupted
ablation and repeats nothing that is finished.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2r2_ds.commands.common import add_plugin_option, command_words
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.commands.evaluate import evaluation_parser
from w2r2_ds.config.cli import OneLineParser
from w2r2_ds.config.io import DEMO_RECIPE, load_config, read_yaml
from w2r2_ds.config.options import decoded
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.fault_tolerance.exit_codes import DONE, FAILED
from w2r2_ds.utils.logging import stdout_to_stderr
from w2r2_ds.utils.plugins import IMPORTED

if TYPE_CHECKING:
    from w2r2_ds.diagnostics.ablation.plan import Plan

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Train and evaluate a grid of options with several seeds, and compare the arms. Other options are those of w2r2 "
    "train, and hold for all runs."
)
LEVEL = 0.95
"""Coverage of the intervals."""
OF_ABLATION = ("checkpoint", "out", "score_only", "format", "local_rank", "plugin")
"""Options of w2r2 evaluate that an evaluation cannot have."""


@reports_errors("ablate")
def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 if a run failed."""
    options, train_words = ablation_parser().parse_known_args(command_words(args))
    for word in train_words:
        for name in ("--resume", "--train.seed"):
            if word.partition("=")[0] == name:
                raise ValueError(f"{name} is set for every run; use --seeds for seeds, and omit --resume.")
    return run(options, train_words)


def ablation_parser() -> OneLineParser:
    """Parser of the ablation's own options; those of w2r2 train remain unknown words."""
    usage = "%(prog)s --out FOLDER (--grid YAML | --preset NAME) [options] [--section.field VALUE ...]"
    parser = OneLineParser(prog="w2r2 ablate", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--config", default=str(DEMO_RECIPE), metavar="RECIPE", help="YAML recipe of all runs; default: the demo's.")
    add("--out", type=Path, required=True, metavar="FOLDER", help="Folder of the runs and the results.")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="YAML",
        help="Options and their values, {option: [value, ...], ...}, as YAML text or a file; every combination is an "
        "arm. A list of such grids, or the option several times, adds their arms.",
    )
    add("--preset", help="A grid: lambda or mu (the paper's Fig. 3), or push_terms (none and every registered one).")
    add("--seeds", type=decoded, default=3, help="Number of seeds (0, 1, ...), or a list of them; default: 3.")
    add("--baseline", metavar="ARM", help="Arm that the others are compared with; default: the first one.")
    add("--deepspeed", default="ds_configs/zero3.json", metavar="JSON", help="DeepSpeed JSON of all runs.")
    add(
        "--evaluations",
        metavar="YAML",
        help="Evaluations of every run, {name: {option: value, ...}, ...} with options of w2r2 evaluate, as YAML text "
        "or a file; default: {fused: {geometry: fused}, zero: {geometry: zero}}.",
    )
    add("--metrics", action="append", default=[], metavar="TEXT", help="Only metrics whose name contains this text.")
    add("--ranks", type=int, default=1, help="Ranks of a run: its GPUs, or processes on a CPU; default: 1.")
    add("--jobs", type=int, default=0, help="Runs at once; default: as many as GPUs or cores allow.")
    add("--dry_run", action="store_true", help="Print the commands of unfinished runs, and start nothing.")
    add("--slurm", action="store_true", help="Write the commands for slurm/ablate.sbatch, and start nothing.")
    add("--table_only", action="store_true", help="Only compare the runs that are finished.")
    add_plugin_option(parser)
    return parser


def run(options: argparse.Namespace, train_words: Sequence[str]) -> int:
    """Check all arms, run what is unfinished, and compare; returns the exit code.

    Args:
        options: values of `ablation_parser`.
        train_words: options of w2r2 train for all runs.
    """
    # Imported after the command line is parsed: these import torch.
    from w2r2_ds.diagnostics.ablation.commands import array_command, write_array
    from w2r2_ds.diagnostics.ablation.plan import check_identity

    if sum((options.dry_run, options.slurm, options.table_only)) > 1:
        raise ValueError("--dry_run, --slurm and --table_only exclude each other; pass one of them.")
    plan, base = make_plan(options, train_words)
    if options.dry_run:
        return print_commands(plan, options)
    with stdout_to_stderr():
        prepare(plan, base)
    check_identity(plan.out, shared_values(base, plan), plan.evaluations)
    if options.slurm:
        write_array(plan)
        print(array_command(plan))
        return DONE
    failures = [] if options.table_only else run_here(plan, options)
    compare_arms(plan, options, failures)
    return FAILED if failures else DONE


def make_plan(options: argparse.Namespace, train_words: Sequence[str]) -> tuple[Plan, RunConfig]:
    """The ablation, and the run configuration that all arms share; every arm's configuration is checked."""
    from w2r2_ds.diagnostics.ablation.grid import arms_of, option_words, parse_grid, preset
    from w2r2_ds.diagnostics.ablation.plan import EVALUATIONS, Plan
    from w2r2_ds.objective.push_terms import PUSH_TERMS, build_push_term
    from w2r2_ds.training.deepspeed.config import load_ds_config

    if not Path("launchers/train.py").is_file():
        raise ValueError("launchers/train.py does not exist; run this command in the repository root.")
    grids = [grid for text in options.grid for grid in parse_grid(text_or_file(text))]
    if options.preset is not None:
        grids += preset(options.preset, list(PUSH_TERMS))
    if not grids:
        raise ValueError("pass a grid with --grid, such as {objective.lambda_det: [0, 0.5, 1.5]}, or a --preset.")
    arms = arms_of(grids)
    base = load_config(options.config, train_words)
    words = [f"--config={options.config}", *train_words]
    if base.demo.enabled:
        words.append("--demo.enabled=false")  # `prepare` makes the demo's data once, for all runs
    load_ds_config(options.deepspeed)
    steps = {}
    for arm in arms:
        config = load_config(options.config, [*train_words, *option_words(arm.options)])
        build_push_term(config.objective.push_term)
        steps[arm.name] = config.train.steps
    plan = Plan(
        out=options.out,
        train_words=words,
        steps=steps,
        arms=arms,
        seeds=seeds_of(options.seeds),
        baseline=options.baseline or arms[0].name,
        deepspeed=options.deepspeed,
        evaluations=evaluations_of(options.evaluations) if options.evaluations else EVALUATIONS,
        plugins=tuple(IMPORTED),
    )
    return plan, base


def text_or_file(text: str) -> str:
    """The content of a file if there is one of this name, else the text itself, which then is YAML."""
    looks_like_path = "\n" not in text and not text.lstrip().startswith(("{", "["))
    return Path(text).read_text(encoding="utf-8") if looks_like_path and Path(text).is_file() else text


def seeds_of(value: Any) -> list[int]:
    """A number of seeds, or a list of them, as a list; raises ValueError for any other value."""
    numbers = list(range(value)) if type(value) is int else value
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"--seeds is {value!r}; it must be a number of seeds, at least 1, or a list of seeds.")
    return numbers


def evaluations_of(text: str) -> dict[str, dict[str, Any]]:
    """Name -> options of the evaluations; raises ValueError for an option or value that w2r2 evaluate does not have."""
    value = decoded(text) if text.lstrip().startswith("{") else read_yaml(text)
    if not isinstance(value, Mapping) or not value or not all(isinstance(each, Mapping) for each in value.values()):
        raise ValueError("--evaluations must be {name: {option: value, ...}, ...}, such as {fused: {geometry: fused}}.")
    parser = evaluation_parser()
    parser.exit_on_error = False
    for name, chosen in value.items():
        for option in chosen:
            if option in OF_ABLATION:
                raise ValueError(f"--evaluations: {name} has the option {option}, which is set for every run.")
        try:
            parser.parse_args([f"--{option}={each}" for option, each in chosen.items()])
        except ArgumentError as error:
            raise ValueError(f"--evaluations: {name}: {' '.join(str(error).split())}") from None
    return {str(name): dict(chosen) for name, chosen in value.items()}


def prepare(plan: Plan, base: RunConfig) -> None:
    """Make the demo's data if the recipe is the demo, and check that every evaluation has exactly one task."""
    from w2r2_ds.demo.assets import prepare_demo
    from w2r2_ds.evaluation.datasets import find_sets

    if base.demo.enabled:
        prepare_demo(base)
    for name, chosen in plan.evaluations.items():
        data = chosen.get("data")
        try:
            find_sets(base.data, chosen.get("task"), None if data is None else Path(data))
        except ValueError as error:
            raise ValueError(f"--evaluations: {name}: {error}") from None


def shared_values(base: RunConfig, plan: Plan) -> dict[str, Any]:
    """What all runs share, with dotted names: configuration, DeepSpeed JSON and plug-ins."""
    from w2r2_ds.training.deepspeed.config import load_ds_config

    config = dict(_dotted(asdict(base), ""))
    for name in ("out", "resume", "train.seed"):
        del config[name]
    return {**config, "deepspeed": load_ds_config(plan.deepspeed), "plugins": list(plan.plugins)}


def _dotted(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def print_commands(plan: Plan, options: argparse.Namespace) -> int:
    """Print the commands of all unfinished runs to standard output."""
    from w2r2_ds.diagnostics.ablation.commands import Devices, remaining_steps

    for each in plan.runs:
        for step in remaining_steps(plan, each, Devices(options.ranks), lambda: 29500):
            print(shlex.join(step.words))
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
