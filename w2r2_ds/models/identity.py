"""Which weights a model was built from: equal sizes do not make two models the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

TENSORS = 16
"""Tensors that are looked at, evenly spread over the sorted names; one row of each."""


def weights_identity(name_or_path: str | Path) -> str:
    """16 hexadecimal digits that tell the safetensors weights of a directory (or cached hub id) from others.

    The same for the same tensors in other shards; different after any training that touches most weights. Costs a few
    small reads, not the whole file.

    Raises:
        ValueError: there are no safetensors weights.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file  # a second that directories need not wait for

        folder = Path(str(cached_file(str(name_or_path), "config.json"))).parent
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    if not where:
        raise ValueError(f"{folder} holds no safetensors weights; copy the complete model directory.")
    names = sorted(where)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // TENSORS)]:
        with safe_open(where[name], framework="pt") as opened:
            part = opened.get_slice(name)
            row = part[0:1] if part.get_shape() else opened.get_tensor(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()} ".encode())
            digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
