"""Load the scripts of docs/scripts/, which are not a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def docs_script(name: str) -> Any:
    """docs/scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_scripts_{name}", DOCS / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses find the types of their fields
    spec.loader.exec_module(module)
    return module
