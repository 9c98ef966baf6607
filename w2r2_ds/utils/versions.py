"""Versions of packages and name of the processor, on which results depend."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import w2r2_ds

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Version of this package, of Python and of `PACKAGES`."""
    return {"w2r2_ds": w2r2_ds.__version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES}


def processor_name() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
