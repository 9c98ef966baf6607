"""`model.kernels` and `model.attention` on this machine: chosen once, when the model is built, and said in one line."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from w2r2_ds.kernels.triton_compat import triton

Kernels = Literal["torch", "triton"]


def resolve_kernels(name: str) -> Kernels:
    """`model.kernels`; auto is triton where there is a CUDA device and Triton and Liger are installed.

    Raises:
        ValueError: triton is asked for where it cannot run.
    """
    there = {"triton": triton, "liger-kernel": find_spec("liger_kernel")}
    missing = next((package for package, found in there.items() if found is None), "")
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if name == "auto":
        return "triton" if torch.cuda.is_available() and not missing else "torch"
    if name == "triton" and missing:
        raise ValueError(f'model.kernels is triton, but {missing} is not installed; pip install "w2r2-ds[kernels]".')
    if name == "triton" and not runs:
        raise ValueError(
            "model.kernels is triton, but there is no CUDA device; give --model.kernels torch (or auto). To run the "
            "kernels in Triton's slow interpreter, set TRITON_INTERPRET=1."
        )
    return "triton" if name == "triton" else "torch"


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """`model.attention`; auto is flash_attention_2 where flash_attn is installed, on a GPU in bfloat16; else sdpa."""
    if name != "auto":
        return name
    runs = torch.cuda.is_available() and dtype == torch.bfloat16 and find_spec("flash_attn") is not None
    return "flash_attention_2" if runs else "sdpa"


def describe(kernels: str, attention: str, dtype: torch.dtype) -> str:
    """What was chosen, for the start of a run.

    Raises:
        ValueError: see `resolve_kernels`.
    """
    return (
        f"kernels: {resolve_kernels(kernels)} (model.kernels {kernels}), "
        f"attention: {resolve_attention(attention, dtype)} (model.attention {attention})"
    )


def resolve_dtype(name: str) -> torch.dtype:
    """`model.dtype`; auto is bfloat16 on a GPU and float32 without."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
