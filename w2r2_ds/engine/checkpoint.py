"""What is saved: the trained tensors, DeepSpeed's optimizer shards, and a description of both.

RUN/checkpoints/step-000030/trainable.safetensors   LoRA and merger, whole tensors, for evaluation and export
                            engine/                 DeepSpeed's shards, for an exact resume
                            rng-RANK.pt             every rank's random state
                            config.yaml             the resolved configuration
                            checkpoint.json         step, model fingerprint, versions; written last
RUN/checkpoints/latest                              name of the newest complete checkpoint; moves last
                best                                name of the one with the best validation; moves after `latest`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from w2r2_ds.config import RunConfig, load_config, save_config
from w2r2_ds.models.build import fingerprint, trainable
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.versions import versions

TENSORS = "trainable.safetensors"
DESCRIPTION = "checkpoint.json"
BEST = "best"
MAY_CHANGE = (
    frozenset(f"data.{name}" for name in ("root", "workers"))
    | frozenset(f"model.{name}" for name in ("vlm", "vggt", "merger", "attention"))
    | frozenset(f"objective.{name}" for name in ("gap_every", "gap_samples"))
    | frozenset(
        f"train.{name}" for name in ("micro_batch", "save_every", "keep_last", "wandb", "tensorboard", "hang_seconds")
    )
    | frozenset(f"train.{name}" for name in ("eval_every", "eval_samples", "eval_max_new_tokens", "best_by"))
)
"""Options that a resumed run may change: where things lie, and what leaves the losses alone up to rounding."""


def save_checkpoint(
    engine: Any,
    config: RunConfig,
    step: int,
    metrics: dict[str, float],
    data: Sequence[str],
    best: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint aside, rename it, then move `latest`; every rank calls it.

    `data` says what the training sets hold (``data.loading.digests``). `best`, where this one has the best validation
    so far, says by what; then `best` moves too.
    """
    folder = Path(config.out) / "checkpoints"
    final = folder / f"step-{step:06d}"
    aside = folder / f"step-{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    # DeepSpeed keeps rank 0's client state only below ZeRO-3; every rank's random state is a file of its own.
    torch.save(rng_state(), aside / f"rng-{dist.get_rank()}.pt")
    engine.save_checkpoint(
        str(aside), tag="engine", client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
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
            "best": best,
            "data": list(data),
            "versions": versions(),
        }
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        point(folder / "latest", final)
        if best is not None:
            point(folder / BEST, final)
        prune(folder, config.train.keep_last)
    dist.barrier()
    return final


def point(file: Path, checkpoint: Path) -> None:
    """Let `latest` or `best` name another checkpoint, at once."""
    aside = file.with_name(file.name + ".partial")
    aside.write_text(checkpoint.name + "\n")
    os.replace(aside, file)


def pointed(file: Path) -> Path:
    """The checkpoint that `latest` or `best` names, which need not be there."""
    return file.parent / file.read_text().strip()


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints, and the best."""
    complete = [path.parent for path in folder.glob(f"step-*/{DESCRIPTION}") if path.parent.suffix != ".partial"]
    best = pointed(folder / BEST) if (folder / BEST).is_file() else None
    for old in sorted(complete, key=lambda path: (path / DESCRIPTION).stat().st_mtime)[:-keep]:
        if old != best:
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
    """The checkpoint folder of a run (its latest), of RUN/checkpoints/latest or best, or of a checkpoint itself.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    path = Path(path)
    file = path / "checkpoints" / "latest"
    if path.name in ("latest", BEST) and path.is_file():
        file = path
    if file.is_file():
        path = pointed(file)
    if not (path / DESCRIPTION).is_file():
        raise ValueError(
            f"{path} holds no complete checkpoint ({DESCRIPTION} is missing); name a run, a step folder, or "
            "checkpoints/best of a run that validated (train.eval_every)."
        )
    return path


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has saved anything."""
    return (Path(run) / "checkpoints" / "latest").is_file()


def check_same_model(path: Path, model: W2R2) -> None:
    """Refuse a checkpoint of another model."""
    refuse_other_model(json.loads((path / DESCRIPTION).read_text())["model"], model, path / DESCRIPTION)


def refuse_other_model(saved: dict[str, Any], model: W2R2, source: Path) -> None:
    """Compare a saved fingerprint with a model's, naming the first field that differs."""
    for field, value in fingerprint(model).items():
        if saved.get(field) != value:
            raise ValueError(
                f"{source}: model.{field} is {saved.get(field)!r}, but the configured model has {value!r}; "
                "use the configuration the checkpoint was trained with."
            )


def check_same_run(path: Path, config: RunConfig) -> None:
    """Refuse to go on with options that would change the run, naming the first one that differs."""
    saved, wanted = asdict(load_config(path / "config.yaml")), asdict(config)
    for section in ("data", "model", "objective", "train"):
        for field, value in wanted[section].items():
            if f"{section}.{field}" not in MAY_CHANGE and saved[section][field] != value:
                raise ValueError(
                    f"{path / 'config.yaml'} has {section}.{field} = {saved[section][field]!r}, now it is {value!r}; "
                    "a resumed run goes on as it began: give the old value, or a new --out."
                )


def check_same_data(path: Path, config: RunConfig, data: Sequence[str]) -> None:
    """Refuse to go on with training sets that hold something else: the order of an epoch would be another one's."""
    saved = json.loads((path / DESCRIPTION).read_text()).get("data")  # None in checkpoints of before
    for source, mine, theirs in zip(config.data.train, data, data if saved is None else saved, strict=True):
        if mine != theirs:
            raise ValueError(
                f"{Path(config.data.root) / source.path} is not the data set that {path} was trained on; a resumed run "
                "goes on as it began: prepare it as before, or give a new --out."
            )


def load_trainable(path: Path, model: W2R2) -> None:
    """Load the trained tensors of a checkpoint into an unsharded model, strictly."""
    check_same_model(path, model)
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


def resume(engine: Any, path: Path, config: RunConfig, data: Sequence[str]) -> int:
    """Load weights, optimizer, schedule and random state; returns the step to go on with."""
    check_same_model(path, engine.module.model)
    saved = json.loads((path / DESCRIPTION).read_text())
    if saved["world_size"] != dist.get_world_size():
        raise ValueError(
            f"{path} was written by {saved['world_size']} rank(s) and cannot be resumed on {dist.get_world_size()}; "
            "start as many ranks as before."
        )
    check_same_run(path, config)
    check_same_data(path, config, data)
    _, state = engine.load_checkpoint(str(path), tag="engine", load_module_strict=False)
    set_rng_state(torch.load(path / f"rng-{dist.get_rank()}.pt", weights_only=True))
    return int(state["step"])


def best_until(checkpoint: Path) -> dict[str, Any] | None:
    """What `best` was saved with, for a run that goes on from `checkpoint`; None if the best must be found afresh.

    A kill may fall between two moves: `checkpoint` itself is the best where it says so. One that is gone, or that was
    saved after `checkpoint`, is forgotten.
    """
    description = json.loads((checkpoint / DESCRIPTION).read_text())
    if description.get("best") is not None:
        if dist.get_rank() == 0:
            point(checkpoint.parent / BEST, checkpoint)
        return dict(description["best"])
    file = checkpoint.parent / BEST
    kept = pointed(file) / DESCRIPTION if file.is_file() else file
    best = json.loads(kept.read_text()) if kept.is_file() and kept != file else {}
    return best.get("best") if best.get("step", 0) <= description["step"] else None


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
