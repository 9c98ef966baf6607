"""Recipes and saved configurations are data: what would make their reader import code, or open other files, is refused.

jsonargparse lets a file name a class by ``class_path``, or by a text where an object stands, and imports its module
before it finds that the class does not fit. A run or a recipe of somebody else is read by the same parser.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from w2r2_ds.printable import CONTROL, holds_secret, one_line

CODE = frozenset({"class_path", "init_args", "dict_kwargs", "__path__", "__default_config__"})
"""Keys by which jsonargparse is told to import something, and its own marks."""
_SECTIONS = ("data", "model", "objective", "train", "demo")


class Recipe(ActionConfigFile):
    """``--config FILE``: looked at before jsonargparse reads it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Refuse, or read as jsonargparse does."""
        file = Path(values)
        try:
            text = file.read_text(encoding="utf-8") if _is_file(file) else str(values)
            tree = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            tree = None  # jsonargparse says what is wrong
        for problem in code_in(tree):
            parser.error(f"{values}: {problem}")
        super().__call__(parser, cfg, values, option_string)


def code_in(tree: Any) -> Iterator[str]:
    """What of a configuration's tree is no plain value, a sentence each."""
    if not isinstance(tree, Mapping):
        return
    for name, key, value in _members(tree):
        last = key.rpartition(".")[2]  # jsonargparse reads "data.class_path: X", too
        if last in CODE or name == "config":
            yield f"{name} would import code or read another file, and a configuration holds values only; remove it"
        elif (name in _SECTIONS and not isinstance(value, Mapping)) or (not key and isinstance(value, str)):
            yield f"{name} is {value!r}, but must be a section of fields"


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
