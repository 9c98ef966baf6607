"""What is saved: the trained tensors, DeepSpeed's optimizer shards, and a description of both.

RUN/checkpoints/step-000030/trainable.safetensors   LoRA and merger, whole tensors, for evaluation and export
                            engine/                 DeepSpeed's shards, for an exact resume
                            checkpoint.json         step, model fingerprint, versions; written last
RUN/checkpoints/latest                              name of the newest complete checkpoint; moves last
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from w2r2_ds.config import RunConfig, save_config
from w2r2_ds.models.build import fingerprint, trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.versions import versions

TENSORS = "trainable.safetensors"
DESCRIPTION = "checkpoint.json"


def save_checkpoint(engine: Any, config: RunConfig, step: int, metrics: dict[str, float]) -> Path:
    """Write a checkpoint aside, rename it, then move `latest`; every rank calls it."""
    folder = Path(config.out) / "checkpoints"
    final = folder / f"step-{step:06d}"
    aside = folder / f"step-{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    state = {"step": step, "rng": rng_state()}
    engine.save_checkpoint(
        str(aside), tag="engine", client_state=state, save_latest=False, exclude_frozen_parameters=True
    )
    tensors = gather_trainable(engine.module.model)
    if dist.get_rank() == 0:
        save_file(tensors, aside / TENSORS)
        save_config(config, aside / "config.yaml")
        description = {
            "step": step,
            "world_size": dist.get_world_size(),
            "model": fingerprint(engine.module.model),
            "metrics": metrics,
            "versions": versions(),
        }
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        (folder / "latest.partial").write_text(final.name + "\n")
        os.replace(folder / "latest.partial", folder / "latest")
        prune(folder, config.train.keep_last)
    dist.barrier()
    return final


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints."""
    for old in sorted(folder.glob("step-??????"))[:-keep]:
        shutil.rmtree(old)


def gather_trainable(model: W2R2) -> dict[str, torch.Tensor]:
    """Whole trained tensors by name, on the CPU; every rank calls it, ZeRO-3 partitions are gathered."""
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        tensors = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"ungathered tensors {empty}"
    return tensors


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder of a run (its latest) or of a checkpoint itself.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    path = Path(path)
    folder = path / "checkpoints"
    if (folder / "latest").is_file():
        path = folder / (folder / "latest").read_text().strip()
    if not (path / DESCRIPTION).is_file():
        raise ValueError(
            f"{path} holds no complete checkpoint ({DESCRIPTION} is missing); name a run or a step folder."
        )
    return path


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has saved anything."""
    return (Path(run) / "checkpoints" / "latest").is_file()


def check_same_model(path: Path, model: W2R2) -> None:
    """Refuse a checkpoint of another model, naming the first field that differs."""
    saved = json.loads((path / DESCRIPTION).read_text())["model"]
    for field, value in fingerprint(model).items():
        if saved.get(field) != value:
            raise ValueError(
                f"{path / DESCRIPTION}: model.{field} is {saved.get(field)!r}, but the configured model has {value!r}; "
                "use the configuration the checkpoint was trained with."
            )


def load_trainable(path: Path, model: W2R2) -> None:
    """Load the trained tensors of a checkpoint into an unsharded model, strictly."""
    check_same_model(path, model)
    assign_trainable(load_file(path / TENSORS), model, path / TENSORS)


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


def resume(engine: Any, path: Path) -> int:
    """Load weights, optimizer, schedule and random state; returns the step to go on with."""
    check_same_model(path, engine.module.model)
    saved = json.loads((path / DESCRIPTION).read_text())
    if saved["world_size"] != dist.get_world_size():
        raise ValueError(
            f"{path} was written by {saved['world_size']} ranks and cannot be resumed on {dist.get_world_size()}; "
            "start as many ranks as before."
        )
    _, state = engine.load_checkpoint(str(path), tag="engine", load_module_strict=False)
    set_rng_state(state["rng"])
    return int(state["step"])


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's random state."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Go on with a saved random state."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
