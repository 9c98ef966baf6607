"""Whether an optional package works, found out by importing it: an installed package may fail to import."""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec


@lru_cache
def import_problem(module: str) -> str:
    """Reason why a module cannot be imported, to follow its name in a message; empty if it can."""
    if find_spec(module) is None:
        return "is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # code of the package runs, which may raise anything, e.g. for another CUDA version
        detail = " ".join(str(error).split())
        return f"is installed, but cannot be imported ({type(error).__name__}: {detail})"
    return ""
