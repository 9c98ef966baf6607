"""``geometry_merger.safetensors``: the weights of geometry merger and fusion in exports and converted models."""

from __future__ import annotations

from pathlib import Path

import torch

from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.utils.files.safetensors_io import read_strictly

MERGER = "geometry_merger.safetensors"
FUSION = "fusion."
"""Prefix of the fusion's tensors. The merger's tensors have no prefix; their names are VG-LLM's."""


def merger_tensors(model: W2R2) -> dict[str, torch.Tensor]:
    """Tensor name in the file -> tensor; the fusion `add` has none."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.geometry_merger.state_dict().items()}
    return tensors | {FUSION + name: tensor.detach().contiguous() for name, tensor in model.fusion.state_dict().items()}


@torch.no_grad()
def load_merger(model: W2R2, file: Path) -> None:
    """Copy the weights of a file into merger and fusion, in the model's dtype.

    Raises:
        ValueError: the file cannot be read, or does not have exactly the model's tensors and shapes.
    """
    own = merger_tensors(model)
    reshape = "use the model.vlm, model.geometry and model.merger_hidden that it was trained with"
    for name, tensor in read_strictly(
        file, "the geometry merger", own, "another model.fusion or scale_hint", reshape
    ).items():
        own[name].copy_(tensor)
