"""Triton if it is installed, and helpers to launch kernels.

Without Triton the files of the kernels can still be imported; `check_kernels` (select.py) raises before a launch.
Kernels load bfloat16 and compute in float32: arithmetic in bfloat16 is silently wrong in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["blocks", "jit", "power_of_two", "precision", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(body: Callable[..., None]) -> Any:
    """`triton.jit`, which reads TRITON_INTERPRET when it is called; without Triton the function itself."""
    return triton.jit(body) if triton is not None else body


def blocks(size: int, block: int) -> int:
    """Number of blocks of `block` elements that cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a float32 `tl.dot`: TF32 holds bfloat16 values exactly, but not float32 values."""
    return "tf32" if dtype == torch.bfloat16 else "ieee"
