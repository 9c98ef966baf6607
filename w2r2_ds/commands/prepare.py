"""Prepare data: ``w2r2 prepare scanrefer --root data/scannet``; ``w2r2 prepare scanrefer --help`` lists the options."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from w2r2_ds.commands.common import add_plugin_option, command_words, function_parser, parse, report_error
from w2r2_ds.config.cli import Parser

COMMANDS = {
    "scanrefer": "a sentence about an object -> the object's box",
    "scan2cap": "an object given by its position -> a sentence about it",
    "scanqa": "a question about a scene -> a short answer",
    "detection": "a few neighbouring frames -> the boxes of all visible objects",
    "boxes": "ScanRefer's boxes from ScanNet's meshes and annotations",
    "synthetic": "furnished rooms with annotations, in ScanNet's layout",
    "demo": "scenes and tiny models of the demo recipe",
    "geometry": "features of the frozen encoders, ahead of training, into data.cache",
}
"""Name -> first line of its help. Listed here because importing the tasks imports torch."""


def main(args: list[str] | None = None) -> int:
    """Run one preparation; returns the exit status, which is 1 also if ``--check`` finds missing files."""
    try:
        # The deepspeed launcher puts --local_rank before the subcommand.
        words = [word for word in command_words(args) if not word.startswith("--local_rank=")]
        words = with_values(words)
        if words[:1] == ["geometry"]:  # a separate parser: it takes the options of train.py
            geometry(words[1:])
            return 0
        parser = Parser(prog="w2r2 prepare", description="Prepare data for training and evaluation.")
        subcommands = parser.add_subcommands(dest="command")
        names = {**COMMANDS, **_plugin_tasks()}
        chosen = next((word for word in words if word in names), "")
        for name, description in names.items():
            # Only the chosen subcommand gets its options: importing their types is slow.
            subcommands.add_subcommand(name, _parser(name) if name == chosen else Parser(), help=description)
        values = parse(parser, words)
        command = values["command"]
        return _function(command)(**values[command]) or 0
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        return report_error("prepare", error)


def _plugin_tasks() -> dict[str, str]:
    """Name -> first line of the docstring, for tasks of plug-ins.

    A plug-in with a task has imported the registry of tasks; without one, this function does not import it.
    """
    registry = sys.modules.get("w2r2_ds.data.tasks.base")
    tasks = {} if registry is None else registry.TASKS
    documented = {name: (task.__doc__ or name).strip().partition("\n")[0] for name, task in tasks.items()}
    return {name: text for name, text in documented.items() if name not in COMMANDS}


def _parser(name: str) -> Parser:
    """Parser of the options of a subcommand."""
    from w2r2_ds.commands import prepare_data  # imports torch

    if _is_task(name):
        return prepare_data.task_parser(name)
    return function_parser(_function(name), f"w2r2 prepare {name}")


def _function(name: str) -> Callable[..., int | None]:
    """The function that runs a subcommand: `prepare_task` for every task, else the function of the same name."""
    from w2r2_ds.commands import prepare_data

    if _is_task(name):
        return functools.partial(prepare_data.prepare_task, name)
    function: Callable[..., int | None] = getattr(prepare_data, name)
    return function


def _is_task(name: str) -> bool:
    return name not in ("boxes", "synthetic", "demo", "geometry")


def geometry(args: list[str]) -> None:
    """Write the features of the frozen encoders to data.cache before training; `args` as in train.py."""
    from w2r2_ds.config.io import parse_run, run_parser
    from w2r2_ds.config.options import decoded
    from w2r2_ds.utils.distributed import RankInfo, gloo_process_group

    parser = run_parser(
        "Fill the feature cache data.cache with the features of a run's frozen encoders. Takes the options of "
        "train.py; started by torchrun, deepspeed or srun, all ranks share the work.",
        "w2r2 prepare geometry",
    )
    add_plugin_option(parser)
    parser.add_argument("--deepspeed", help="Accepted like the option of train.py; not used.")
    parser.add_argument("--local_rank", type=int, help="Set by the deepspeed launcher.")
    parser.add_argument("--splits", type=decoded, default=["train", "val"], help="Data sets: [train], [val] or both.")
    parser.add_argument("--dry_run", type=decoded, default=False, help="Only report what is missing, and its size.")
    config, options = parse_run(parser, args)
    if not isinstance(options.splits, list) or not set(options.splits) <= {"train", "val"}:
        parser.error(f"--splits is {options.splits}; use [train], [val] or [train, val]")
    # Imported after the command line is parsed, because it imports torch and transformers.
    from w2r2_ds.data.prepare.features import fill_cache

    ranks = RankInfo.from_environment()
    with gloo_process_group(ranks):
        fill_cache(config, options.splits, options.dry_run, ranks)


def with_values(words: Sequence[str]) -> list[str]:
    """The command line with a value after every flag, as jsonargparse needs it: ``--check true``."""
    flags = ("--check", "--dry_run", "--skip_broken_scenes", "--skip_without_box", "--overwrite")
    written: list[str] = []
    for i, word in enumerate(words):
        bare = word in flags and (i + 1 == len(words) or words[i + 1].lower() not in ("true", "false"))
        written += [word, *(["true"] if bare else [])]
    return written
