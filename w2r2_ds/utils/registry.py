"""Registry of extensions of one kind (tasks, VLM families, push terms, ...): register a value, find it by its name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TypeVar

Value = TypeVar("Value")


class Registry(dict[str, Value]):
    """Name -> extension, in the order of registration.

    Args:
        option: the option or field that selects a value, for messages, such as ``"model.fusion"``.
        built_in: name -> module that registers it, imported on first use.
    """

    def __init__(self, option: str, built_in: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.option, self.built_in = option, built_in or {}

    def register(self, name: str, value: Value) -> Value:
        """Add and return a value; raises ValueError if another value has this name."""
        known = self.get(name)
        # A file may be imported twice, as a plug-in and as a module: the same definition may be registered again.
        taken = known is not None and _source(known) != _source(value)
        reserved = name in self.built_in and value.__module__ != self.built_in[name]
        if taken or reserved:
            raise ValueError(f"{value.__module__}: {self.option} {name!r} exists already; choose another name.")
        self[name] = value
        return value

    def find(self, name: str, option: str = "") -> Value:
        """Return the value of a name; raises ValueError with `option` and all names if there is none."""
        name = str(name)  # a YAML file may have a number or a list here
        if name in self.built_in and name not in self:
            import_module(self.built_in[name])
        if name not in self:
            names = list(dict.fromkeys([*self.built_in, *self]))
            hint = "".join(f" (did you mean {like}?)" for like in get_close_matches(name, names, 1))
            raise ValueError(
                f"{option or self.option} is {name!r}; it must be one of {', '.join(names)}{hint}, or registered by a "
                "file or module given with --plugin."
            )
        return self[name]


def _source(value: object) -> tuple[object, str, int]:
    """File and qualified name of a class or function, or of an object's class; of a function also its line."""
    definition = value if hasattr(value, "__qualname__") else type(value)
    module = sys.modules.get(definition.__module__)
    code = getattr(definition, "__code__", None)  # distinguishes two lambdas
    return getattr(module, "__file__", module), definition.__qualname__, code.co_firstlineno if code else 0
