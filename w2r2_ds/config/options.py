"""The command-line options of a configuration dataclass, generated from its fields and docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

FREE_SECTIONS = ("push_term",)
"""Fields whose keys belong to a registered extension: `--objective.push_term.margin 2.0`."""


@dataclass(frozen=True)
class Option:
    """One field of a configuration.

    Attributes:
        name: dotted, such as `train.lr`.
        type: for readers, such as `int` or `sequential | lockstep`.
        default: the default value.
        help: the sentence of the docstring.
        text: whether the value is a string and used unchanged; other values are decoded as YAML.
    """

    name: str
    type: str
    default: Any
    help: str
    text: bool


@functools.cache
def options(config: type) -> dict[str, Option]:
    """All fields of a dataclass and of the dataclasses in it, by dotted name."""
    return {option.name: option for option in _options(config, "")}


def _options(config: type, prefix: str) -> Iterator[Option]:
    types_ = get_type_hints(config)
    helps = {each.arg_name: each.description or "" for each in docstring_parser.parse(config.__doc__ or "").params}
    for field in dataclasses.fields(config):
        kind = types_[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _options(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        sentence = " ".join(helps[field.name].split())
        yield Option(f"{prefix}{field.name}", _type_name(kind), _plain(default), sentence, _is_text(kind))


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option for every field; absent ones are absent from the namespace."""
    groups: dict[str, Any] = {}
    for name, option in options(config).items():
        section = name.partition(".")[0] if "." in name else ""
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        groups[section].add_argument(
            f"--{name}",
            dest=name,
            metavar=name.rpartition(".")[2].upper(),
            type=str if option.text else decoded,
            default=argparse.SUPPRESS,
            help=f"{option.help} (type: {option.type}, default: {option.default})".replace("%", "%%"),
        )


def decoded(text: str) -> Any:
    """Decode an option that is not a string as YAML: `5`, `1e-4`, `true`, `[a, b]`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise argparse.ArgumentTypeError(f"not a value: {text!r}") from None


def set_option(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in a nested tree."""
    *sections, last = name.split(".")
    for section in sections:
        inner = tree.get(section, {})
        # `--objective.push_term margin` beside `--objective.push_term.margin 2.0`
        tree[section] = tree = {"name": inner} if isinstance(inner, str) else dict(inner)
    tree[last] = value


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind)))


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(map(_type_name, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {_type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return str(kind.__name__)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, so that a default reads as YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value
