"""Plug-ins: Python files or modules that register extensions (tasks, trackers, ...), imported before a command runs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

IMPORTED: list[str] = []
"""Plug-ins of this process, files as absolute paths; worker processes that are not forked import them too."""


def import_plugins(words: list[str]) -> list[str]:
    """Import the plug-ins of ``--plugin`` options, in order, and return the other words of a command line.

    Only a command line can import code; recipes and saved configurations contain values only.

    Raises:
        ValueError: a file or module does not exist.
    """
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != "--plugin":
            rest.append(word)
            continue
        target = value if equals else next(remaining, "")
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
        IMPORTED.append(target)
        return
    file = Path(target).resolve()
    if not file.is_file():
        raise ValueError(f"--plugin {target}: there is no such file.")
    name = f"w2r2_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    IMPORTED.append(str(file))
