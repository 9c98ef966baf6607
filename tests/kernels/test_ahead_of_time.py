"""Every kernel compiles for Ampere, Hopper and Blackwell, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from w2r2_ds.kernels import dropout_matmul, dual_stream_embed

triton = pytest.importorskip("triton", reason="kernels are not installed: pip install 'w2r2-ds[kernels]'")

POINTERS = {
    dual_stream_embed._embed: {"token": "*i32"},
    dropout_matmul._down: {"keep": "*i1"},
    dropout_matmul._outer: {"keep": "*i1", "parts": "*fp32"},
    dropout_matmul._up: {"keep": "*i1"},
}
"""Argument types of a kernel that differ from `DEFAULTS`."""
DEFAULTS = {
    **{name: "*bf16" for name in ("text", "shortcut", "fused", "fused_stream", "shortcut_stream")},
    **{name: "*bf16" for name in ("x", "a", "low", "out")},
    **{name: "i32" for name in ("width", "rows", "rank", "tiles")},
    **{name: "fp32" for name in ("scale",)},
}
CONSTANTS = {"RANK": 16, "COLUMNS": 128, "PRECISION": "tf32", "ROWS": 64, "BLOCK": 2048}


ALWAYS = {(kernel, 90) for kernel in POINTERS} | {(dual_stream_embed._embed, 80), (dropout_matmul._up, 100)}
"""Compiling takes seconds: every kernel for Hopper, every other GPU once; the remaining pairs run nightly."""


def cases() -> Iterator[Any]:
    for kernel in POINTERS:
        for capability in (80, 90, 100):
            marks = [] if (kernel, capability) in ALWAYS else [pytest.mark.nightly]
            yield pytest.param(kernel, capability, id=f"{kernel.__name__.strip('_')}-sm_{capability}", marks=marks)


@pytest.mark.parametrize(("kernel", "capability"), list(cases()))
def test_kernels_compile_for_each_architecture(
    kernel: Any, capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # An empty folder: otherwise a second run would find the compiled kernels in Triton's cache.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    signature = {name: (DEFAULTS | POINTERS[kernel]).get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: CONSTANTS[name] for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
