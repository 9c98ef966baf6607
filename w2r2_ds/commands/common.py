"""Functions shared by the commands: build a parser, parse a command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from w2r2_ds.config.cli import Parser
from w2r2_ds.config.numbers import check_numbers
from w2r2_ds.types.geometry import DemoGeometry
from w2r2_ds.utils.logging import setup_logging, stdout_to_stderr
from w2r2_ds.utils.plugins import import_plugins

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables with PyTorch's settings of its GPU allocator: the current one, and older names."""


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo's commands.

    Args:
        geometry: geometry encoder of the tiny model: exact point maps, or a tiny VGGT.
    """

    geometry: DemoGeometry = "point_map"


def function_parser(function: Callable[..., Any], prog: str, skip: tuple[str, ...] = ()) -> Parser:
    """Build a parser whose options are the parameters of a function and whose help is its docstring.

    Args:
        function: the first paragraph of its docstring is the description, its ``Args`` describe the options.
        prog: name of the command in help and errors.
        skip: parameters that are not options.
    """
    parser = Parser(prog=prog, description=description(function))
    parser.add_function_arguments(function, as_group=False, skip=set(skip))
    return parser


def description(function: Callable[..., Any]) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join((function.__doc__ or "").strip().partition("\n\n")[0].split())


def parse(parser: Parser, words: list[str]) -> dict[str, Any]:
    """Parse a command line: option -> value, with dataclasses instantiated.

    Raises:
        ValueError: a number is not finite, negative or too large.
    """
    add_plugin_option(parser)
    values: dict[str, Any] = parser.instantiate(parser.parse_args(words)).as_dict()
    del values["plugin"]
    subcommands = [value for value in values.values() if isinstance(value, dict)]
    for options in subcommands or [values]:
        for name, value in options.items():
            check_numbers(value, f"--{name}")
    return values


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin`` to the help only: `import_plugins` has already removed it from the command line."""
    parser.add_argument(
        "--plugin",
        metavar="FILE_OR_MODULE",
        help="Python file or module that registers extensions, imported first; can be repeated.",
    )


def command_words(args: list[str] | None) -> list[str]:
    """Set up logging and the GPU allocator, import plug-ins, and return the other words of the command line.

    Hyphens in option names become underscores: ``--score-only`` is ``--score_only``.

    Args:
        args: command line without the program; None for that of this process.

    Raises:
        ValueError: a plug-in cannot be imported.
    """
    setup_logging()
    use_expandable_segments(os.environ)  # before a plug-in, which may import torch
    with stdout_to_stderr():  # a plug-in may print
        return import_plugins([_underscored(word) for word in (sys.argv[1:] if args is None else args)])


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's GPU allocator grow its segments, unless the user has set its options; in place.

    Sequence lengths differ from step to step, and ZeRO-3 gathers weights of up to 1 GB. In segments of fixed size,
    freed memory would be lost to fragmentation. PyTorch reads the variable when the first GPU tensor is made.
    """
    if not any(environment.get(name) for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word
