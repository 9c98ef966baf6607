"""Recipes and saved configurations are data: what would make their reader import code, or open other files, is refused.

jsonargparse lets a file name a class by ``class_path``, or by a text where an object stands, and imports its module
before it finds that the class does not fit. A text is YAML to it, in which the same may stand. A run or a recipe of
somebody else is read by the same parser.
"""

from __future__ import annotations

import os
import sys
import threading
import unicodedata
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from w2r2_ds.utils.sanitize import CONTROL, holds_secret, one_line

CODE = frozenset({"class_path", "init_args", "dict_kwargs", "__path__", "__default_config__"})
"""Keys by which jsonargparse is told to import something, and its own marks."""
DEEPEST = 8
"""Levels of a configuration's tree, of which `data.train[0].path` has four; a YAML alias can name what it stands in."""
SECTIONS = ("data", "model", "objective", "train", "demo")
_MIXTURES = ("data.train", "data.val")
_PARSER = ("jsonargparse", "yaml")


class Recipe(ActionConfigFile):
    """``--config FILE``: looked at before jsonargparse reads it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Refuse, or read as jsonargparse does."""
        file = Path(os.path.expanduser(values))  # as jsonargparse does
        is_file = _is_file(file)
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8") if is_file else values)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            parser.error(f"{values} cannot be read as YAML ({str(error) or type(error).__name__})")
        if not is_file and (not isinstance(tree, Mapping) or os.path.exists(file)):  # a look would empty a pipe
            parser.error(f"--config {values} is no regular file; name one, or give the recipe's own text")
        for problem in code_in(tree):
            parser.error(f"{values}: {problem}")
        with importing_nothing():
            super().__call__(parser, cfg, str(file) if is_file else values, option_string)


def code_in(tree: Any) -> Iterator[str]:
    """What of a configuration's tree is no plain value, a sentence each; a tree without an end has endless ones."""
    if not isinstance(tree, Mapping):
        yield "it holds no fields; a configuration is made of sections and their fields"
        return
    for name, key, value in _members(tree):
        last = key.rpartition(".")[2]  # jsonargparse reads "data.class_path: X", too
        if last in CODE or name == "config":
            yield f"{name} would import code or read another file, and a configuration holds values only; remove it"
        elif "+" in key:
            yield f"{name} would append to a list, which only a command line can; write the whole list without the +"
        elif name.count(".") + name.count("[") >= DEEPEST:
            yield f"{name[:60]} is nested deeper than any field"
        elif name in _MIXTURES and not isinstance(value, list):
            yield f"{name} is {value!r}, but must be a list of sections with path, weight and cap"
        elif not isinstance(value, Mapping) and (
            name in SECTIONS or (not key and (isinstance(value, str) or name.rpartition("[")[0] in _MIXTURES))
        ):
            yield f"{name} is {value!r}, but must be a section of fields"


@contextmanager
def importing_nothing() -> Iterator[None]:
    """A second lock beside `code_in`: this thread imports no module that is not yet there, but the parser's own.

    What is there already has run; a module that is found by nobody else is not run.
    """
    lock = _Lock()
    sys.meta_path.insert(0, lock)
    try:
        yield
    finally:
        sys.meta_path.remove(lock)


class _Lock:
    """A finder of modules that refuses."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse, or leave it to the next finder."""
        if threading.get_ident() == self.thread and name.partition(".")[0] not in _PARSER:
            raise ModuleNotFoundError(f"{name} is not imported for a configuration, which holds values only", name=name)


def section(text: str) -> str:
    """A whole section on a command line: fields, as ``{root: x}``; jsonargparse would take a file's name, too.

    Raises:
        ArgumentTypeError: it is another text, whose file nobody has looked at.
    """
    try:
        fields = isinstance(yaml.safe_load(text), Mapping)
    except (ValueError, RecursionError, yaml.YAMLError):
        fields = False
    if not fields:
        raise ArgumentTypeError(f"expected fields, as '{{field: value}}', got {text}; a file is given by --config")
    return text


def refuse_texts(tree: Mapping[str, Any]) -> None:
    """Refuse texts of a configuration that would reach logs, checkpoints and cards and must not.

    Raises:
        ValueError: one holds a control character, or a key, a token or a password (which is not repeated).
    """
    for name, _, value in _members(tree):
        if not isinstance(value, str):
            continue
        if holds_secret(value):
            raise ValueError(
                f"{name} holds a key, a token or a password, which would be written into config.yaml, checkpoints and "
                "cards; give it in the environment (HF_TOKEN, WANDB_API_KEY), or by `hf auth login`, `wandb login`."
            )
        if found := CONTROL.search(value):
            kind = unicodedata.name(found[0], "a control character")
            raise ValueError(f"{name} is '{one_line(value)}', which holds {kind}; remove it.")


def _members(tree: Any, before: str = "") -> Iterator[tuple[str, str, Any]]:
    """Everything below a tree: its full name, its key (empty in a list), its value."""
    inside = []
    if isinstance(tree, Mapping):
        inside = [(f"{before}.{key}" if before else str(key), str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        inside = [(f"{before}[{index}]", "", value) for index, value in enumerate(tree)]
    for name, key, value in inside:
        yield name, key, value
        yield from _members(value, name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a whole recipe in place of a path is too long for a name
        return False
