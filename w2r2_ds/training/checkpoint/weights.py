"""The trained tensors of a checkpoint: gather them from all ranks, load them into an unsharded model."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch

from w2r2_ds.models.build import trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.compat import check_fingerprint
from w2r2_ds.training.checkpoint.manifest import MANIFEST, TENSORS, read_manifest, verify
from w2r2_ds.utils.files.safetensors_io import read_strictly


def gather_trainable(model: W2R2) -> dict[str, torch.Tensor]:
    """Whole trained tensors on the CPU, keyed by parameter name. Collective."""
    parameters = trainable(model)
    # ZeRO-3 trap: outside this context a parameter is an empty tensor, and `state_dict()` would save shape (0,). All
    # ranks must enter it with the same parameters in the same order, although only rank 0 writes the result.
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        tensors = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"ungathered tensors {empty}"
    return tensors


@torch.no_grad()
def load_trainable(path: Path, model: W2R2) -> None:
    """Load the trained tensors of a checkpoint into an unsharded model, in place.

    Raises:
        ValueError: the file does not have the SHA-256 of the manifest, the fingerprint is of another model, or names
            or shapes differ.
    """
    check_fingerprint(read_manifest(path)["model"], model.fingerprint, path / MANIFEST)
    problem = verify(path, only={TENSORS})
    if problem is not None:
        raise ValueError(f"{problem.removesuffix('.')}; copy the checkpoint again.")
    parameters = trainable(model)
    for name, tensor in read_strictly(path / TENSORS, "the trained tensors", parameters).items():
        parameters[name].copy_(tensor)
