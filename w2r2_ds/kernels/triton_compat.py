"""Triton if it is installed, and helpers to launch kernels.

Without Triton the files of the kernels can still be imported; `check_kernels` (select.py) raises before a launch.
Kernels add and round in float32, also for bfloat16 tensors: arithmetic in bfloat16 is silently wrong in Triton's
interpreter. Only the operands of a product stay bfloat16, on a GPU (`dot_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["dot_dtype", "interpreted", "jit", "num_blocks", "power_of_two", "tl", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(body: Callable[..., None]) -> Any:
    """`triton.jit`, or without Triton the function itself."""
    # Called when a kernel's file is imported: TRITON_INTERPRET must be set before.
    return triton.jit(body) if triton is not None else body


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def num_blocks(size: int, block: int) -> int:
    """Number of blocks of `block` elements that cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton's dtype of the operands of `tl.dot` for tensors of this dtype; the products are summed in float32.

    On a GPU the operands keep their dtype: tensor cores multiply bfloat16 exactly, and need no conversion of the tiles.
    Triton's interpreter needs float32.
    """
    return tl.float32 if interpreted() else getattr(tl, str(dtype).removeprefix("torch."))
