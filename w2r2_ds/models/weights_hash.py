"""Hashes of model weights, to distinguish models of equal architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

TENSORS = 16
"""Approximate number of tensors that are hashed, evenly spread over the sorted names; the first row of each."""


def weights_identity(name_or_path: str | Path) -> str:
    """Fast identity of the safetensors weights of a directory or cached hub id: 16 hexadecimal digits.

    Independent of sharding; changes with any training that updates most weights. Reads a few rows, not whole files.

    Raises:
        ValueError: there are no safetensors weights.
    """
    where = _files_of(model_weights(name_or_path))
    if not where:
        raise ValueError(f"{name_or_path} holds no safetensors weights; copy the complete model directory.")
    names = sorted(where)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // TENSORS)]:
        with safe_open(where[name], framework="pt") as opened:
            part = opened.get_slice(name)
            row = part[0:1] if part.get_shape() else opened.get_tensor(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()} ".encode())
            digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors_digest(files: Sequence[Path], wanted: Callable[[str], bool]) -> str:
    """SHA-256 of names, dtypes, shapes and values of tensors; independent of sharding.

    Reads every byte, at about 1.5 GB/s. Feature caches need this: one changed weight makes their features invalid.

    Args:
        files: safetensors files.
        wanted: whether the tensor of a name is included.

    Raises:
        ValueError: no tensor is included, or a file cannot be read.
    """
    named = ", ".join(map(str, files)) or "no files"
    digest = hashlib.sha256()
    try:
        where = _files_of(files)
        names = sorted(filter(wanted, where))
        for name in names:
            with safe_open(where[name], framework="pt") as opened:
                tensor = opened.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights in {named} cannot be read ({error}); fetch or copy them again.") from error
    if not names:
        raise ValueError(
            f"None of {named} holds the weights of the encoder whose features are to be cached; copy the complete "
            "model directory, or leave data.cache empty."
        )
    return digest.hexdigest()


def model_weights(name_or_path: str | Path) -> list[Path]:
    """Safetensors files of a model's directory or of a hub id, downloaded if necessary.

    Raises:
        ValueError: they cannot be downloaded.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=["config.json", "*.safetensors"]))
        except Exception as error:  # the hub client raises exceptions of several libraries
            raise ValueError(
                f"The weights of {name_or_path} could not be fetched from the Hugging Face Hub "
                f"({type(error).__name__}); fetch them where there is a network and give their directory."
            ) from error
    return sorted(folder.glob("*.safetensors"))


def _files_of(files: Sequence[Path]) -> dict[str, Path]:
    """Tensor name -> its file."""
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    return where
