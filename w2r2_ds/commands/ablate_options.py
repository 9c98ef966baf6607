"""Options of ``w2r2 ablate``: the parser, and the ablation that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2r2_ds.commands.common import add_plugin_option
from w2r2_ds.commands.evaluate import evaluations_of
from w2r2_ds.config.cli import OneLineParser
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.config.options import decoded
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.utils.plugins import IMPORTED

if TYPE_CHECKING:
    from w2r2_ds.diagnostics.ablation.plan import Plan

DESCRIPTION = (
    "Train and evaluate a grid of options with several seeds, and compare the arms. Other options are those of w2r2 "
    "train, and hold for all runs."
)


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


def make_plan(options: argparse.Namespace, train_words: Sequence[str]) -> tuple[Plan, RunConfig, list[RunConfig]]:
    """The ablation, the run configuration that all arms share, and the checked configuration of every arm.

    Args:
        options: values of `ablation_parser`.
        train_words: options of w2r2 train for all runs.

    Raises:
        ValueError: an option or value is unknown, or two arms have the same configuration.
    """
    from w2r2_ds.diagnostics.ablation.grid import arms_of, option_words, parse_grid, preset
    from w2r2_ds.diagnostics.ablation.plan import EVALUATIONS, Plan
    from w2r2_ds.objective.push_terms import PUSH_TERMS, check_push_term
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
    configs = [load_config(options.config, [*train_words, *option_words(arm.options)]) for arm in arms]
    for index, config in enumerate(configs):
        check_push_term(config)
        if (same := configs.index(config)) < index:
            raise ValueError(
                f"--grid: the arms {arms[same].name} and {arms[index].name} have the same configuration; omit one."
            )
    plan = Plan(
        out=options.out,
        train_words=words,
        steps={arm.name: config.train.steps for arm, config in zip(arms, configs, strict=True)},
        arms=arms,
        seeds=seeds_of(options.seeds),
        baseline=options.baseline or arms[0].name,
        deepspeed=options.deepspeed,
        evaluations=evaluations_of(options.evaluations) if options.evaluations else EVALUATIONS,
        plugins=tuple(IMPORTED),
    )
    return plan, base, configs


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
