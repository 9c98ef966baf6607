"""Triton where it is installed: `tl` for the bodies of kernels, `jit` for their decorator.

Without it the kernels' files can still be imported; `resolve_kernels` raises ValueError if they are requested.
Bodies load bfloat16 and go on in float32: in Triton's interpreter bfloat16 arithmetic is silently wrong.
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
    """`triton.jit`, which reads TRITON_INTERPRET now; the bare function where there is no Triton."""
    return triton.jit(body) if triton is not None else body


def blocks(size: int, block: int) -> int:
    """Programs of `block` elements that cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a float32 `tl.dot`: bfloat16 values are exact in TF32, float32 ones only as they are."""
    return "tf32" if dtype == torch.bfloat16 else "ieee"
