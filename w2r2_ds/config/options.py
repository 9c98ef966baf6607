"""Command-line options of a configuration dataclass, generated from its fields and docstrings."""

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
"""Fields whose keys are defined by a registered extension: `--objective.push_term.margin 2.0`."""


@dataclass(frozen=True)
class Option:
    """One field of a configuration.

    Attributes:
        name: dotted name, such as `train.lr`.
        type: type for the help, such as `int` or `sequential | lockstep`.
        default: default value.
        help: description of the field in the docstring.
        text: whether the value is a string, which is used unchanged; other values are decoded as YAML.
    """

    name: str
    type: str
    default: Any
    help: str
    text: bool


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every value in nested dictionaries; an empty dictionary is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def options(config: type) -> dict[str, Option]:
    """Options of all fields of a dataclass and of its nested dataclasses, keyed by dotted name."""
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


def in_free_section(name: str) -> bool:
    """Whether a dotted name is a key of one of `FREE_SECTIONS`."""
    section = name.rpartition(".")[0]
    return section.rpartition(".")[2] in FREE_SECTIONS


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option for every field of a dataclass; the namespace has no entry for options that are not passed."""
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
    """Decode the value of an option as YAML: `5`, `1e-4`, `true`, `[a, b]`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise argparse.ArgumentTypeError(f"not a value: {text!r}") from None


def set_option(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a dotted name in nested dictionaries, in place."""
    *sections, last = name.split(".")
    for section in sections:
        inner = tree.get(section, {})
        # A string in place of a section is a name: `--objective.push_term margin --objective.push_term.margin 2.0`.
        tree[section] = tree = {"name": inner} if isinstance(inner, str) else dict(inner)
    tree[last] = value


def _is_text(kind: Any) -> bool:
    """Whether a type is `str` or a `Literal` of strings."""
    return kind is str or (get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind)))


def _type_name(kind: Any) -> str:
    """A type as it is printed in the help."""
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
    """A default value for the help: dataclasses become dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value
