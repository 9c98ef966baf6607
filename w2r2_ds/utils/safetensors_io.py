"""A safetensors file that holds just what a model wants: every tensor, none besides, each of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_strictly(
    file: Path,
    what: str,
    own: Mapping[str, Tensor],
    other: str = "another model",
    reshape: str = "it belongs to another model",
) -> dict[str, Tensor]:
    """The tensors of a file, with their names as keys.

    Args:
        file: to read.
        what: it holds, in words.
        own: the model's tensors, whose names and shapes it must have.
        other: to what a file with other names belongs.
        reshape: what to do about other shapes.

    Raises:
        ValueError: the file cannot be read, or does not hold exactly these tensors.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot read {what} ({error}); copy the file again.") from error
    for name in sorted(tensors.keys() ^ own.keys()):
        where = "is missing in it" if name in own else "is in it but not in the model"
        raise ValueError(f"{file}: {name} {where}; it belongs to {other}.")
    for name, target in own.items():
        if tensors[name].shape != target.shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(target.shape)}; {reshape}."
            )
    return tensors
