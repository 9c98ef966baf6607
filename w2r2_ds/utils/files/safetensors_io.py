"""Find the safetensors files of a model directory, and read a file whose names and shapes must match exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from w2r2_ds.utils.files.json_io import read_json_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_strictly(
    file: Path,
    content: str,
    expected: Mapping[str, Tensor],
    owner: str = "another model",
    shape_hint: str = "it belongs to another model",
) -> dict[str, Tensor]:
    """Read the tensors of a file: name -> tensor.

    Args:
        file: safetensors file.
        content: description of the tensors, for messages.
        expected: tensors of the model; names and shapes must match.
        owner: what a file with other names belongs to, for the message.
        shape_hint: cause of other shapes and what to do, for the message.

    Raises:
        ValueError: the file cannot be read, or names or shapes differ.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot read {content} ({error}); copy the file again.") from error
    for name in sorted(tensors.keys() ^ expected.keys()):
        difference = "is missing in it" if name in expected else "is in it but not in the model"
        raise ValueError(f"{file}: {name} {difference}; it belongs to {owner}.")
    for name, target in expected.items():
        shape = tensors[name].shape
        if shape != target.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(shape)}, the model {tuple(target.shape)}; {shape_hint}.")
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors file of a model directory, or the shards of its index. Raises ValueError without either."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}; download the weights into it.")
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map from weights to files; download it again.")
    files = [directory / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.suffix != ".safetensors":
            raise ValueError(f"{index} names {file.name!r}, which is no safetensors file; use safetensors.")
        if file.parent != directory or not file.is_file():
            raise ValueError(f"{index} names {file.name!r}, which is not beside it; download the missing shard.")
    return files
