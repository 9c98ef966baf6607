"""Command-line parsers with errors in one sentence and suggestions for misspelt options.

There are two. `OneLineParser` (argparse) is for run configurations: pydantic validates their values, and the options of
registered extensions are not known in advance, which jsonargparse does not support. `Parser` (jsonargparse) is for
commands that are functions: it converts values to the types of the parameters and generates the help from docstrings.
"""

from __future__ import annotations

import argparse
import re
from argparse import _SubParsersAction
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from w2r2_ds.utils.sanitize import one_line, without_secrets

USER_ERROR = 1
"""Exit code of a wrong option, as of every error that the user must correct (fault_tolerance/exit_codes.py)."""
MIN_SIMILARITY = 0.65
"""Minimum similarity of a suggested name (ratio of `difflib.SequenceMatcher`)."""


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, with errors in one sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 1, or raise ValueError if `exit_on_error` is False."""
        sentence = one_line(without_secrets(re.sub(r"^argument (--[\w.]+)", r"\1", message)))
        if not self.exit_on_error:
            raise ValueError(f"{sentence}.")
        self.exit(USER_ERROR, f"{self.prog}: {sentence}; --help lists the options.\n")

    def take_free_options(self, unknown: Sequence[str], given: dict[str, Any]) -> None:
        """Add hyper-parameters of registered extensions to `given`; every other unknown option is an error.

        Args:
            unknown: arguments that argparse did not parse.
            given: options as nested dictionaries; changed in place.
        """
        from w2r2_ds.config.options import decoded, in_free_section, set_option

        words, wrong = iter(unknown), []
        for word in words:
            name, equals, value = word.partition("=")
            if word.startswith("--") and in_free_section(name.removeprefix("--")):
                # Either `--objective.push_term.margin=2.0`, or the value is the next word.
                text = value if equals else next(words, None)
                if text is None:
                    self.error(f"{name}: expected one argument")
                set_option(given, name.removeprefix("--"), decoded(text))
            elif word.startswith("-"):
                wrong.append(name)
        # Without any option among the unknown words, the first one is reported: a positional argument.
        if wrong or (unknown and not any(word.startswith("-") for word in unknown)):
            known = [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            wrong = wrong or list(unknown[:1])
            self.error("; ".join(f"there is no option {name}{did_you_mean(name, known)}" for name in wrong))


class _HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with types as in `OneLineParser`: ``auto | none`` for a Literal, ``Path`` for a class."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text = super()._get_type_str(action)
        if text is None:  # an option without a type
            return None
        text = re.sub(r"Optional\[(.*)\]", r"\1 | null", re.sub(r"<class '(\w+)'>", r"\1", text))
        return re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), text)


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of a command line or a recipe in one sentence instead of the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter} | options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit with status 1."""
        if not self.exit_on_error:
            super().error(message, ex)
        names = unknown_names(message)
        if names:
            sentence = "; ".join(f"there is no option {name}{did_you_mean(name, self.names())}" for name in names)
        elif found := re.fullmatch(r"(the following arguments are required: )(.*)", message):
            sentence = found[1] + ", ".join(map(self._option, found[2].split(", ")))
        else:
            sentence = without_python_types(message)
        sentence = one_line(without_secrets(sentence))
        self.exit(USER_ERROR, f"{self.prog.replace(' [options]', '')}: {sentence}; --help lists the options.\n")

    def _option(self, name: str) -> str:
        """The option of a field: ``--root`` for `root`, and for `boxes.root` of the subcommand `boxes`."""
        subparsers = [action for action in self._actions if isinstance(action, _SubParsersAction)]
        for subcommand in (choice for action in subparsers for choice in action.choices):
            name = name.removeprefix(f"{subcommand}.")
        return f"--{name}"

    def names(self) -> list[str]:
        """All options of this parser and of its subcommands, without their dashes."""
        found = []
        for action in self._actions:
            if isinstance(action, _SubParsersAction):
                found += [name for parser in action.choices.values() for name in parser.names()]
            found += [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
        return found


def unknown_names(message: str) -> list[str]:
    """Unknown options in an error message of jsonargparse: with dashes for a command line, without for a recipe."""
    if found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = found[1].split()
        return [word.partition("=")[0] for word in words if word.startswith("-")] or words[:1]
    if found := re.fullmatch(r"Group '(.*)' does not accept option '(.*)'", message):
        return [".".join(found.groups())]
    if found := re.fullmatch(r"Option '(.*)' is not accepted", message):
        return [found[1]]
    return []


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Suggestion for a misspelt name: `` (did you mean a, b?)`` with similar known names; empty if none is similar.

    The last parts of dotted names are compared: `objctive.lambda_det` and `lambda_det` both give
    `objective.lambda_det`.

    Args:
        name: the misspelt name, with or without dashes.
        known: valid names, without dashes.
        most: largest number of suggestions.
    """
    bare = name.lstrip("-")
    dashes = name[: len(name) - len(bare)]
    scores = {}
    for other in known:
        last = SequenceMatcher(None, bare.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        if last >= MIN_SIMILARITY:
            # Of names with equal last parts, the one with the most similar section comes first.
            scores[other] = last + 0.1 * SequenceMatcher(None, bare, other).ratio()
    similar = sorted(scores, key=lambda other: (-scores[other], other))[:most]
    return f" (did you mean {', '.join(dashes + other for other in similar)}?)" if similar else ""


def without_python_types(message: str) -> str:
    """An error message of jsonargparse on one line, without Python's type syntax."""
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r"Parser key \"(.*?)\":", r"\1:", text).replace("typing.", "").replace(". Got value:", ", got")
    return re.sub(r"Expected an? (?:<class '(.*?)'>|)", r"expected \1", text)
