"""Resolve `model.kernels`, `model.attention` and `model.dtype` on this machine, without measuring (see measure.py)."""

from __future__ import annotations

import os
from typing import Literal

import torch

from w2r2_ds.utils.packages import import_problem

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
    for package, module in (("triton", "triton"), ("liger-kernel", "liger_kernel")):
        if problem := import_problem(module):
            return f'{package} {problem} (pip install "w2r2-ds[kernels]")'
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


def flash_problem(dtype: torch.dtype) -> str:
    """Reason why flash_attention_2 cannot run on this machine in this dtype; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if dtype != torch.bfloat16:
        return "model.dtype is not bfloat16"
    if torch.cuda.get_device_capability() < (8, 0):
        return "flash-attn needs a GPU of the Ampere generation or later"
    if problem := import_problem("flash_attn"):
        return f"flash-attn {problem}"
    # flash-attn-4 installs a package flash_attn too, without the functions of flash-attn 2.
    return "" if transformers_accepts_flash_attn() else "transformers needs the package flash-attn 2.3.3 or later"


def transformers_accepts_flash_attn() -> bool:
    """Whether transformers can use the installed package for flash_attention_2."""
    from transformers.utils import is_flash_attn_2_available  # transformers takes seconds

    return bool(is_flash_attn_2_available())


def check_attention(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError if `model.attention` is flash_attention_2 and cannot run on this machine."""
    reason = flash_problem(dtype) if name == "flash_attention_2" else ""
    if reason:
        raise ValueError(f"model.attention is flash_attention_2, but {reason}; use --model.attention sdpa (or auto).")


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """Resolve `model.attention`; auto is flash_attention_2 if it can run (`flash_problem`), else sdpa."""
    if name != "auto":
        return name
    return "sdpa" if flash_problem(dtype) else "flash_attention_2"


def segment_attention(name: str, dtype: torch.dtype) -> str:
    """What computes attention within windows, frames and packed sequences (models/attention/varlen.py)."""
    attention = resolve_attention(name, dtype)
    if attention != "sdpa":
        return attention
    varlen = torch.cuda.is_available() and dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0)
    return "torch varlen" if varlen else "batched sdpa"


def describe_attention(name: str, dtype: torch.dtype) -> str:
    """Description of `model.attention` on this machine: what was chosen, and why.

    Raises:
        ValueError: see `check_attention`.
    """
    check_attention(name, dtype)
    reason = "set"
    if name == "auto":
        reason = f"auto: {flash_problem(dtype) or 'flash-attn works'}"
    attention, segments = resolve_attention(name, dtype), segment_attention(name, dtype)
    within = "" if segments == attention else f"; windows and packed sequences: {segments}"
    return f"attention: {attention}{within} (model.attention {reason})"


def resolve_dtype(name: str) -> torch.dtype:
    """Resolve `model.dtype`; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
