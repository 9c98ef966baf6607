"""Versions of the packages that results depend on, recorded in checkpoints and adapters."""

from __future__ import annotations

import platform
from importlib.metadata import version

import w2r2_ds

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Version of this package, of Python and of `PACKAGES`."""
    return {"w2r2_ds": w2r2_ds.__version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES}
