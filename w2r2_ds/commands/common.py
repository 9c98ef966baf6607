"""Shared by the commands: read a command line, report an error in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from w2r2_ds.config.cli import Parser
from w2r2_ds.utils.logging import setup_logging
from w2r2_ds.utils.plugins import import_plugins
from w2r2_ds.utils.sanitize import message

FAILED = 1
"""Exit status after an error that the user can correct."""


def function_parser(function: Callable[..., Any], prog: str, skip: tuple[str, ...] = ()) -> Parser:
    """A parser whose options are the parameters of a function; its docstring is the help.

    Args:
        function: the first paragraph of its docstring describes the command, its ``Args`` the options.
        prog: name of the command in help and errors.
        skip: parameters that the caller adds itself.
    """
    parser = Parser(prog=prog, description=(function.__doc__ or "").strip().partition("\n\n")[0])
    parser.add_function_arguments(function, as_group=False, skip=set(skip))
    return parser


def parse(parser: Parser, words: list[str]) -> dict[str, Any]:
    """Option name -> value, dataclasses built."""
    add_plugin_option(parser)
    values: dict[str, Any] = parser.instantiate(parser.parse_args(words)).as_dict()
    del values["plugin"]
    return values


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """List ``--plugin`` in the help; `import_plugins` has already taken its values out of the command line."""
    parser.add_argument(
        "--plugin",
        metavar="FILE_OR_MODULE",
        help="Python file or module to import first, which registers extensions; can be given several times.",
    )


def command_words(args: list[str] | None) -> list[str]:
    """Set up logging, import the plug-ins, and return the other words of the command line.

    Hyphens in the names of options become underscores: ``--score-only`` is ``--score_only``.

    Args:
        args: the command line without the program; None takes that of this process.

    Raises:
        ValueError: a plug-in cannot be imported.
    """
    setup_logging()
    return import_plugins([_underscored(word) for word in (sys.argv[1:] if args is None else args)])


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def report_error(command: str, error: Exception) -> int:
    """Write an error that the user can correct as one line on standard error; returns the exit status."""
    print(f"w2r2 {command}: {message(error)}", file=sys.stderr)
    return FAILED
