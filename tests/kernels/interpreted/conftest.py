"""Fixture: patches for Liger's kernels in Triton's interpreter.

The interpreter passes float arguments to a kernel as Python floats, which have no `.to`, and has no libdevice. Liger
uses both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def liger_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass floats as float32 scalars and replace libdevice's `rsqrt` by Triton's."""
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm, rms_norm
    from triton.runtime import interpreter

    stock = interpreter._implicit_cvt

    def converted(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return stock(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    for module in (fused_add_rms_norm, rms_norm):
        monkeypatch.setattr(
            module, "rsqrt", lambda x: tl.math.rsqrt(x)
        )  # replaced at run time: the interpreter resolves the name per call
