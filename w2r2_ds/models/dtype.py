"""Which precision `model.dtype` means on a machine."""

from __future__ import annotations

import torch


def resolve_dtype(name: str) -> torch.dtype:
    """`model.dtype`; auto is bfloat16 on a GPU and float32 without."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
