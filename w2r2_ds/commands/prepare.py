"""Prepare data sets, boxes and encoder features: ``w2r2 prepare scanrefer --root data/scannet``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from w2r2_ds.commands.common import add_plugin_option, command_words, function_parser, parse
from w2r2_ds.commands.errors import reports_errors
from w2r2_ds.config.cli import Parser

SUBCOMMANDS = {
    "scanrefer": "a sentence about an object -> the object's box",
    "scan2cap": "an object given by its position -> a sentence about it",
    "scanqa": "a question about a scene -> a short answer",
    "detection": "a few neighbouring frames -> the boxes of all visible objects",
    "boxes": "ScanRefer's boxes from ScanNet's meshes and annotations",
    "synthetic": "furnished rooms with annotations, in ScanNet's layout",
    "demo": "scenes and tiny model of the demo recipe",
    "geometry": "features of the frozen encoders, written to data.cache before training",
}
"""Name -> description. A table, so that ``w2r2 prepare --help`` does not import the tasks."""
NOT_TASKS = ("boxes", "synthetic", "demo", "geometry")
"""Sub-commands that are functions of their own; all others are tasks of the registry."""


@reports_errors("prepare")
def main(args: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit code, which is 1 after an error or if ``--check`` found missing files."""
    # The deepspeed launcher puts --local_rank before the subcommand.
    words = [word for word in command_words(args) if not word.startswith("--local_rank=")]
    words = with_values(words)
    if words[:1] == ["geometry"]:  # its options are those of `w2r2 train`, which need an argparse parser
        geometry(words[1:])
        return 0
    parser = Parser(prog="w2r2 prepare", description="Prepare data for training and evaluation.")
    commands = parser.add_subcommands(dest="command")
    descriptions = {**SUBCOMMANDS, **_plugin_tasks()}
    chosen = next((word for word in words if word in descriptions), "")
    for name, description in descriptions.items():
        # The others get an empty parser: the options of a task need an import of the tasks, which takes a second.
        commands.add_subcommand(name, _parser(name) if name == chosen else Parser(), help=description)
    values = parse(parser, words)
    command = values["command"]
    return _function(command)(**values[command]) or 0


def _plugin_tasks() -> dict[str, str]:
    """Name -> first line of the docstring, for tasks that plug-ins have registered."""
    # Not imported here, for a fast --help: a plug-in that registers a task has imported the registry itself.
    registry = sys.modules.get("w2r2_ds.data.tasks.base")
    tasks = {} if registry is None else registry.TASKS
    documented = {name: (task.__doc__ or name).strip().partition("\n")[0] for name, task in tasks.items()}
    return {name: text for name, text in documented.items() if name not in SUBCOMMANDS}


def _parser(name: str) -> Parser:
    from w2r2_ds.commands import prepare_data  # imports scipy

    if name not in NOT_TASKS:
        return prepare_data.task_parser(name)
    return function_parser(_function(name), f"w2r2 prepare {name}")


def _function(name: str) -> Callable[..., int | None]:
    """The function that runs a subcommand: `prepare_task` for every task, else the function of the same name."""
    from w2r2_ds.commands import prepare_data

    if name not in NOT_TASKS:
        return functools.partial(prepare_data.prepare_task, name)
    function: Callable[..., int | None] = getattr(prepare_data, name)
    return function


def geometry(args: list[str]) -> None:
    """Write the features of the frozen encoders to data.cache before training; `args` as in train.py."""
    from w2r2_ds.config.io import parse_run, run_parser
    from w2r2_ds.config.options import decoded
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group

    parser = run_parser(
        "Write the features of a run's frozen encoders to the feature cache, data.cache. The options are those of w2r2 "
        "train; in a launch by torchrun, deepspeed or srun, the ranks divide the work.",
        "w2r2 prepare geometry",
    )
    add_plugin_option(parser)
    parser.add_argument("--deepspeed", help="Option of w2r2 train; not used here.")
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher.")
    parser.add_argument("--splits", type=decoded, default=["train", "val"], help="Data sets: [train], [val] or both.")
    parser.add_argument(
        "--dry_run", type=decoded, default=False, help="Only print the number and size of missing features."
    )
    config, options = parse_run(parser, args)
    if not isinstance(options.splits, list) or not set(options.splits) <= {"train", "val"}:
        parser.error(f"--splits is {options.splits}; use [train], [val] or [train, val]")
    # Imported after the command line is parsed: this imports torch and transformers.
    from w2r2_ds.data.prepare.features import fill_cache

    ranks = RankInfo.from_environment()
    with gloo_process_group(ranks):
        fill_cache(config, options.splits, options.dry_run, ranks)


def with_values(words: Sequence[str]) -> list[str]:
    """Add the value that jsonargparse needs after a flag: ``--check`` becomes ``--check true``."""
    flags = ("--check", "--dry_run", "--skip_broken_scenes", "--skip_without_box", "--overwrite")
    completed: list[str] = []
    for i, word in enumerate(words):
        has_value = i + 1 < len(words) and words[i + 1].lower() in ("true", "false")
        completed += [word, "true"] if word in flags and not has_value else [word]
    return completed
