"""The trained tensors of a checkpoint: gathered whole, and loaded into a model that is not sharded."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch

from w2r2_ds.models.build import trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.compat import check_same_model
from w2r2_ds.training.checkpoint.manifest import TENSORS, verify
from w2r2_ds.utils.safetensors_io import read_strictly


def gather_trainable(model: W2R2) -> dict[str, torch.Tensor]:
    """Whole trained tensors by name, on the CPU; every rank calls it, ZeRO-3 partitions are gathered."""
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        tensors = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"ungathered tensors {empty}"
    return tensors


@torch.no_grad()
def load_trainable(path: Path, model: W2R2) -> None:
    """Load the trained tensors of a checkpoint into an unsharded model, strictly.

    Raises:
        ValueError: they are not those that were saved (their SHA-256 is compared), or another model's.
    """
    check_same_model(path, model)
    wrong = verify(path, only={TENSORS})
    if wrong is not None:
        raise ValueError(f"{wrong.removesuffix('.')}; copy the checkpoint again.")
    parameters = trainable(model)
    for name, tensor in read_strictly(path / TENSORS, "the trained tensors", parameters).items():
        parameters[name].copy_(tensor)
