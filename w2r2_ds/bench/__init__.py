"""Benchmarks of speed and memory; `launchers/bench.py NAME` runs one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

BENCHMARKS = {
    "baseline": "training step of Hugging Face's Trainer on stock Qwen2.5-VL",
    "step_time": "training step of W2R2 relative to a single pass and to the baseline, with and without caches",
    "scene_packing": "time per sample if K questions share the frames of one sequence",
    "feature_cache": "reading geometry features from the cache relative to computing them",
    "zero3_gathers": "bytes that ZeRO-3 gathers per step, by train.pass_order",
    "kernels": "forward and backward of every kernel relative to PyTorch",
}
"""Name -> description. Module NAME has a function NAME that returns a `Report`."""


def load(name: str) -> Callable[..., Any]:
    """Import a benchmark's function."""
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{name}"), name)
    return function
