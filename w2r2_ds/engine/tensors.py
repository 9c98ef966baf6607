"""The trained tensors of a checkpoint: gathered whole, and loaded into a model that is not sharded."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from w2r2_ds.engine.complete import TENSORS, verify
from w2r2_ds.engine.same_run import check_same_model
from w2r2_ds.models.build import trainable
from w2r2_ds.models.w2r2 import W2R2


def gather_trainable(model: W2R2) -> dict[str, torch.Tensor]:
    """Whole trained tensors by name, on the CPU; every rank calls it, ZeRO-3 partitions are gathered."""
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        tensors = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"ungathered tensors {empty}"
    return tensors


def load_trainable(path: Path, model: W2R2) -> None:
    """Load the trained tensors of a checkpoint into an unsharded model, strictly.

    Raises:
        ValueError: they are not those that were saved (their SHA-256 is compared), or another model's.
    """
    check_same_model(path, model)
    wrong = verify(path, only={TENSORS})
    if wrong is not None:
        raise ValueError(f"{wrong.removesuffix('.')}; copy the checkpoint again.")
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path / TENSORS}: cannot read the trained tensors ({error}); copy the checkpoint again."
        ) from error
    assign_trainable(tensors, model, path / TENSORS)


@torch.no_grad()
def assign_trainable(tensors: dict[str, torch.Tensor], model: W2R2, source: Path) -> None:
    """Copy whole tensors into the parameters that train; names and shapes must match exactly."""
    parameters = trainable(model)
    for name in sorted(tensors.keys() ^ parameters.keys()):
        where = "is missing in" if name in parameters else "is in"
        raise ValueError(f"The trained tensor {name} {where} {source}; it belongs to another model.")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}."
            )
        parameter.copy_(tensors[name])
