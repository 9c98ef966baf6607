"""Triton if it is installed, and helpers to launch kernels.

Without Triton the files of the kernels can still be imported; `check_kernels` (select.py) raises before a launch.
Kernels compute in float32, also on bfloat16 tensors: arithmetic in bfloat16 is silently wrong in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["jit", "num_blocks", "power_of_two", "precision", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(body: Callable[..., None]) -> Any:
    """`triton.jit`, or without Triton the function itself."""
    # Called when a kernel's file is imported: TRITON_INTERPRET must be set before.
    return triton.jit(body) if triton is not None else body


def num_blocks(size: int, block: int) -> int:
    """Number of blocks of `block` elements that cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for values of this dtype, which the kernels hold in float32."""
    # TF32 uses tensor cores. It represents bfloat16 values exactly, but would round float32 values.
    return "tf32" if dtype == torch.bfloat16 else "ieee"
