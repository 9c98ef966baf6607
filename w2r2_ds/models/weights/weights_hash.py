"""Hashes of model weights, which distinguish models of equal architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from w2r2_ds.utils.files.hashing import FileVersion, file_version

SAMPLED_TENSORS = 16
"""Approximate number of tensors of which `weights_identity` hashes the first row."""


def weights_identity(name_or_path: str | Path) -> str:
    """Hash of a sample of a model's safetensors weights, 16 hexadecimal digits.

    It is independent of sharding and changes with any training that updates most weights. Reads the first row of some
    tensors, evenly spread over the sorted names, not whole files.

    Args:
        name_or_path: a directory, or a hub id, which is downloaded if necessary.

    Raises:
        ValueError: there are no safetensors weights, or they cannot be read.
    """
    try:
        digest = _sampled_digest(model_weights(name_or_path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The weights in {name_or_path} cannot be read ({error}); fetch or copy them again."
        ) from error
    if not digest:
        raise ValueError(f"{name_or_path} holds no safetensors weights; copy the complete model directory.")
    return digest


def _sampled_digest(files: Sequence[Path]) -> str:
    """`weights_identity` of safetensors files; empty without a tensor."""
    file_of = _tensor_files(files)
    names = sorted(file_of)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        with safe_open(file_of[name], framework="pt") as opened:
            part = opened.get_slice(name)  # reads only the rows that are indexed
            row = part[0:1] if part.get_shape() else opened.get_tensor(name)
            digest.update(f"{name} {part.get_dtype()} {part.get_shape()} ".encode())
            # NumPy has no bfloat16: hash the bytes.
            digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if names else ""


def tensors_digest(files: Sequence[Path], include: tuple[str, ...] = ("",), exclude: tuple[str, ...] = ()) -> str:
    """SHA-256 of names, dtypes, shapes and values of tensors; independent of sharding.

    Reads every byte, at about 1.5 GB/s, once per process and version of the files. The keys of the feature cache need
    the full hash: one changed weight makes the cached features invalid.

    Args:
        files: safetensors files.
        include: prefixes of the names of the tensors to hash; by default all.
        exclude: prefixes of the names of tensors to skip.

    Raises:
        ValueError: no tensor has such a name, or a file cannot be read.
    """
    named = ", ".join(map(str, files)) or "no files"
    try:
        digest = _tensors_digest(tuple((file, file_version(file)) for file in files), include, exclude)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights in {named} cannot be read ({error}); fetch or copy them again.") from error
    if not digest:
        raise ValueError(
            f"None of {named} holds the weights of the encoder whose features are to be cached; copy the complete "
            "model directory, or leave data.cache empty."
        )
    return digest


# The encoder's identity is needed twice at start: for the model's fingerprint and for the keys of the feature cache.
@lru_cache(maxsize=8)
def _tensors_digest(
    files: tuple[tuple[Path, FileVersion], ...], include: tuple[str, ...], exclude: tuple[str, ...]
) -> str:
    """`tensors_digest` of these versions of the files; empty if no tensor has such a name."""
    file_of = _tensor_files([file for file, _ in files])
    names = sorted(name for name in file_of if name.startswith(include) and not name.startswith(exclude))
    digest = hashlib.sha256()
    for name in names:
        with safe_open(file_of[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest() if names else ""


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


def _tensor_files(files: Sequence[Path]) -> dict[str, Path]:
    """Tensor name -> its file."""
    file_of: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            file_of |= dict.fromkeys(opened.keys(), file)
    return file_of
