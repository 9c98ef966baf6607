"""Resolve `model.kernels`, `model.attention` and `model.dtype` on this machine, without measuring (see measure.py)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from w2r2_ds.kernels.triton_compat import triton

Backend = Literal["torch", "triton"]
"""Backend of one function that has a Triton kernel."""

Kernels = frozenset[str]
"""Names of the kernels that a model uses (see `ALL_KERNELS`); PyTorch or PEFT computes the rest."""

TORCH_KERNELS: Kernels = frozenset({"lora_projection"})
"""Kernels that consist of PyTorch operations, so that they run everywhere."""

ALL_KERNELS: Kernels = TORCH_KERNELS | {"dropout_matmul", "dual_stream_embed", "rms_norm", "swiglu"}


def backend_of(kernels: Kernels, name: str) -> Backend:
    """The backend of a function with a Triton kernel, by its name in `ALL_KERNELS`."""
    return "triton" if name in kernels else "torch"


def unavailable(interpreted: bool = False) -> str:
    """Reason why Triton kernels cannot run on this machine; empty if they can.

    Args:
        interpreted: accept Triton's interpreter (TRITON_INTERPRET=1) instead of a CUDA device.
    """
    packages = {"triton": triton, "liger-kernel": find_spec("liger_kernel")}
    for package, found in packages.items():
        if found is None:
            return f'{package} is not installed (pip install "w2r2-ds[kernels]")'
    if torch.cuda.is_available() or (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return "there is no CUDA device"


def check_kernels(name: str) -> None:
    """Raise ValueError if `model.kernels` is triton and Triton kernels cannot run on this machine."""
    reason = unavailable(interpreted=True) if name == "triton" else ""
    if reason:
        raise ValueError(
            f"model.kernels is triton, but {reason}; use --model.kernels torch (or auto). TRITON_INTERPRET=1 runs the "
            "kernels in Triton's slow interpreter."
        )


def describe_kernels(name: str) -> str:
    """Description of `model.kernels` on this machine: torch, triton, or for auto whether kernels will be measured.

    Raises:
        ValueError: see `check_kernels`.
    """
    check_kernels(name)
    if name != "auto":
        return name
    reason = unavailable()
    return f"torch, since {reason}" if reason else "measured at start"


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """Resolve `model.attention`; auto is flash_attention_2 on a GPU in bfloat16 with flash-attn, else sdpa."""
    if name != "auto":
        return name
    runs = torch.cuda.is_available() and dtype == torch.bfloat16 and find_spec("flash_attn") is not None
    return "flash_attention_2" if runs else "sdpa"


def describe_attention(name: str, dtype: torch.dtype) -> str:
    """Description of `model.attention`: resolved, and as configured."""
    return f"attention: {resolve_attention(name, dtype)} (model.attention {name})"


def resolve_dtype(name: str) -> torch.dtype:
    """Resolve `model.dtype`; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
