"""Command-line parsers with errors in one sentence and suggestions for misspelt options.

There are two. `OneLineParser` (argparse) is for run configurations: pydantic validates their values, and the options
of registered extensions are not known in advance, which jsonargparse does not support. `Parser` (jsonargparse) is for
commands that are a function: it converts values to the types of the parameters and makes the help from the docstring.
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

MIN_SIMILARITY = 0.65
"""Minimum similarity of a suggested name (ratio of `difflib.SequenceMatcher`)."""


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser; a wrong command line is one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with status 2, or raise ValueError if `exit_on_error` is off."""
        sentence = one_line(without_secrets(re.sub(r"^argument (--[\w.]+)", r"\1", message)))
        if not self.exit_on_error:
            raise ValueError(f"{sentence}.")
        self.exit(2, f"{self.prog}: {sentence}; --help lists the options.\n")

    def take_free_options(self, unknown: Sequence[str], given: dict[str, Any]) -> None:
        """Add hyper-parameters of registered extensions to `given`; every other unknown option is an error.

        Args:
            unknown: arguments that argparse did not parse.
            given: options as a nested tree; changed in place.
        """
        from w2r2_ds.config.options import FREE_SECTIONS, decoded, set_option

        words, wrong = iter(unknown), []
        for word in words:
            name, equals, value = word.partition("=")
            if word.startswith("--") and name.removeprefix("--").split(".")[-2:-1] in [
                [each] for each in FREE_SECTIONS
            ]:
                text = value if equals else next(words, None)
                if text is None:
                    self.error(f"{name}: expected one argument")
                set_option(given, name.removeprefix("--"), decoded(text))
            elif word.startswith("-"):
                wrong.append(name)
        if wrong or (unknown and not any(word.startswith("-") for word in unknown)):
            known = [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            wrong = wrong or list(unknown[:1])
            self.error("; ".join(f"there is no option {name}{did_you_mean(name, known)}" for name in wrong))


class _HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with classes by their name: ``type: Path``, not ``type: <class 'Path'>``."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text: str | None = super()._get_type_str(action)
        return text and re.sub(r"<class '(\w+)'>", r"\1", text)


class Parser(ArgumentParser):
    """jsonargparse's parser; an error in a command line or a recipe is one sentence, without the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter} | options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        names = unknown_names(message)
        if names:
            sentence = "; ".join(f"there is no option {name}{did_you_mean(name, self.names())}" for name in names)
        else:
            sentence = plain_message(message)
        sentence = one_line(without_secrets(sentence))
        self.exit(2, f"{self.prog.replace(' [options]', '')}: {sentence}; --help lists the options.\n")

    def names(self) -> list[str]:
        """All options of this parser and of its subcommands, without their dashes."""
        found = []
        for action in self._actions:
            if isinstance(action, _SubParsersAction):
                found += [name for parser in action.choices.values() for name in parser.names()]
            found += [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
        return found


def unknown_names(message: str) -> list[str]:
    """Unknown options named in a message of jsonargparse: with dashes from a command line, without from a recipe."""
    if found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = found[1].split()
        return [word.partition("=")[0] for word in words if word.startswith("-")] or words[:1]
    if found := re.fullmatch(r"Group '(.*)' does not accept option '(.*)'", message):
        return [".".join(found.groups())]
    if found := re.fullmatch(r"Option '(.*)' is not accepted", message):
        return [found[1]]
    return []


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """`` (did you mean a, b?)`` with the most similar known names; empty if none is similar.

    Last parts of dotted names are compared: both `objctive.lambda_det` and `lambda_det` give `objective.lambda_det`.
    """
    bare = name.lstrip("-")
    dashes = name[: len(name) - len(bare)]
    scores = {}
    for other in known:
        last = SequenceMatcher(None, bare.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        if last >= MIN_SIMILARITY:
            scores[other] = last + 0.1 * SequenceMatcher(None, bare, other).ratio()  # of equal ends, the same section
    like = sorted(scores, key=lambda other: (-scores[other], other))[:most]
    return f" (did you mean {', '.join(dashes + other for other in like)}?)" if like else ""


def plain_message(message: str) -> str:
    """jsonargparse's message on one line, without Python's types in it."""
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r"Parser key \"(.*?)\":", r"\1:", text).replace("typing.", "").replace(". Got value:", ", got")
    return re.sub(r"Expected an? (?:<class '(.*?)'>|)", r"expected \1", text)
