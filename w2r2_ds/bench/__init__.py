"""The benchmarks behind every claim about speed or memory; `launchers/bench.py NAME` runs one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

BENCHMARKS = (
    "baseline",
    "step_ratio",
    "scene_pack",
    "head_memory",
    "geometry_cache",
    "loader",
    "zero3_bytes",
    "kernels",
    "iou",
    "eval_throughput",
)
"""Each a file here, with a function of its name that returns a `Report`."""


def load(name: str) -> Callable[..., Any]:
    """The function of a benchmark."""
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{name}"), name)
    return function
