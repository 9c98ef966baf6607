"""Plug-ins: Python files or modules that register extensions (tasks, trackers, ...), imported before a command runs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w2r2_ds.utils.source_hash import record_source

IMPORTED: list[str] = []
"""Plug-ins that this process has imported: absolute paths of files, or names of modules.

Worker processes that are not forked import them again.
"""
SHA256: dict[str, str | None] = {}
"""Hash of the code of every entry of `IMPORTED` when it was imported (`source_hash.source_sha256`)."""


def import_plugins(args: list[str]) -> list[str]:
    """Import the plug-ins of all ``--plugin`` options, in order, and return the other arguments of a command line.

    Only a command line can import code; recipes and saved configurations contain values only.

    Raises:
        ValueError: a file or module does not exist.
    """
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        name, equals, value = arg.partition("=")
        if name != "--plugin":
            rest.append(arg)
            continue
        target = value if equals else next(remaining, "")  # --plugin=FILE or --plugin FILE
        if not target:
            raise ValueError("--plugin needs a Python file or the name of a module.")
        import_plugin(target)
    return rest


def import_plugin(target: str) -> None:
    """Import a Python file or a module (dotted name).

    Raises:
        ValueError: it does not exist.
    """
    if not target.endswith(".py"):
        try:
            importlib.import_module(target)
        except ModuleNotFoundError as error:
            if error.name is None or not (target == error.name or target.startswith(f"{error.name}.")):
                raise  # the plug-in exists; a module that it imports does not
            raise ValueError(
                f"--plugin {target}: there is no such module; use a file that ends in .py, or an installed module."
            ) from None
        _record(target, target)
        return
    file = Path(target).resolve()
    if not file.is_file():
        raise ValueError(f"--plugin {target}: there is no such file.")
    name = f"w2r2_plugin_{file.stem}"  # the prefix avoids the names of installed modules
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    _record(str(file), name)


def _record(plugin: str, module: str) -> None:
    """Add an imported plug-in to `IMPORTED`, with the hash of its code."""
    IMPORTED.append(plugin)
    SHA256[plugin] = record_source(module)


def import_missing(imported: list[str]) -> None:
    """Import the plug-ins of another process that this process has not imported."""
    for plugin in imported:
        if plugin not in IMPORTED:
            import_plugin(plugin)


class ImportsPlugins:
    """Base class of objects sent to worker processes: a worker imports the plug-ins before it unpickles their state."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]:
        # pickle first calls the function, which imports the plug-ins, and then reads the state, which may hold objects
        # of a plug-in's classes.
        return _new_with_plugins, (type(self), list(IMPORTED)), self.__dict__


def _new_with_plugins(cls: type, imported: list[str]) -> object:
    """An object of `cls` without its state, which pickle sets next."""
    import_missing(imported)
    return object.__new__(cls)
