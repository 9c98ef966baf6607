"""Which weights a model was built from: equal sizes do not make two models the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

TENSORS = 16
"""Tensors that are looked at, evenly spread over the sorted names; one row of each."""


def weights_identity(name_or_path: str | Path) -> str:
    """16 hexadecimal digits that tell the safetensors weights of a directory (or cached hub id) from others.

    The same for the same tensors in other shards; different after any training that touches most weights. Costs a few
    small reads, not the whole file.

    Raises:
        ValueError: there are no safetensors weights.
    """
    folder = model_folder(name_or_path)
    where = _files_of(sorted(folder.glob("*.safetensors")))
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


def tensors_digest(files: Sequence[Path], wanted: Callable[[str], bool]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of the wanted tensors of some files, however they are sharded.

    Every byte is read, about 1.5 GB/s: for what must not be wrong about a single weight.

    Raises:
        ValueError: there is no such tensor, or a file is broken.
    """
    try:
        return _digest_of(files, wanted)
    except (SafetensorError, OSError) as error:
        named = ", ".join(map(str, files))
        raise ValueError(f"The weights in {named} cannot be read ({error}); fetch or copy them again.") from error


def _digest_of(files: Sequence[Path], wanted: Callable[[str], bool]) -> str:
    where = _files_of(files)
    names = sorted(filter(wanted, where))
    if not names:
        raise ValueError(
            f"None of {', '.join(map(str, files)) or 'no files'} holds the weights of the encoder whose features are "
            "to be cached; copy the complete model directory, or leave data.cache empty."
        )
    digest = hashlib.sha256()
    for name in names:
        with safe_open(where[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def model_weights(name_or_path: str | Path) -> list[Path]:
    """The safetensors files of a model's directory, or of a hub id: those are fetched, as loading the model would.

    Raises:
        ValueError: they cannot be fetched.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=["config.json", "*.safetensors"]))
        except Exception as error:  # the hub client raises many kinds, of several libraries
            raise ValueError(
                f"The weights of model.vlm {name_or_path} could not be fetched from the Hugging Face Hub "
                f"({type(error).__name__}); fetch them where there is a network and give their directory."
            ) from error
    return sorted(folder.glob("*.safetensors"))


def model_folder(name_or_path: str | Path) -> Path:
    """A model's directory, or that of a hub id in the cache."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from transformers.utils.hub import cached_file  # a second that directories need not wait for

    return Path(str(cached_file(str(name_or_path), "config.json"))).parent


def _files_of(files: Sequence[Path]) -> dict[str, Path]:
    """In which file every tensor is."""
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    return where
