"""Liger in Triton's interpreter, for the tests only.

The interpreter hands floats to a kernel as Python's, which have no `.to`, and has no libdevice; Liger uses both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def liger_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats arrive as scalars of float32, `rsqrt` is Triton's own."""
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
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.math.rsqrt(x))  # looked up while it is interpreted
