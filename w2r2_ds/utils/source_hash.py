"""SHA-256 of the code of plug-ins, so that results of an edited plug-in are not taken for those of the new code."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from w2r2_ds.utils.files.hashing import file_sha256, files_sha256

OWN_PACKAGE = __name__.partition(".")[0]

_at_import: dict[str, str | None] = {}
"""Module or top-level package of a plug-in -> hash when it was imported: a later edit does not change what runs."""


def record_source(module: str) -> str | None:
    """Hash the code of a plug-in that has just been imported, for `source_sha256`; returns the hash."""
    package = module.partition(".")[0]
    _at_import.pop(module, None)
    _at_import.pop(package, None)
    digest = _module_sha256(module)
    _at_import[package if hasattr(sys.modules[package], "__path__") else module] = digest
    return digest


def source_sha256(extension: object) -> str | None:
    """SHA-256 of the code of a registered class, function or object; None for one of this package.

    The code is the file that defines it, or all Python files of its package, as it was when the plug-in was imported.
    Other modules that it imports are not included. Also None for a definition without file, in an interactive session.

    Raises:
        OSError: the file cannot be read.
    """
    while isinstance(extension, partial):
        extension = extension.func
    definition = extension if hasattr(extension, "__qualname__") else type(extension)
    name = definition.__module__
    return None if name.partition(".")[0] == OWN_PACKAGE else _module_sha256(name)


def _module_sha256(name: str) -> str | None:
    """SHA-256 of a module's file, or of all files of its top-level package; None without a file."""
    top = name.partition(".")[0]
    for known in (name, top):
        if known in _at_import:
            return _at_import[known]
    folders = list(getattr(sys.modules.get(top), "__path__", []))
    if folders:
        folder = Path(folders[0])
        return files_sha256(folder.rglob("*.py"), folder)
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if file is None else file_sha256(Path(file))
