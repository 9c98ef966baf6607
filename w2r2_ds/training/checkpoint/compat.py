"""What a resumed run must have in common with the run it goes on: model, options, training sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import fingerprint
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.manifest import DESCRIPTION, read_description

MAY_CHANGE = (
    frozenset(
        f"data.{name}" for name in ("root", "workers", "prefetch", "packing", "cache", "cache_gib", "cached_features")
    )
    | frozenset(f"model.{name}" for name in ("vlm", "vggt", "merger", "attention", "kernels"))
    | frozenset(f"objective.{name}" for name in ("gap_every", "gap_samples"))
    | frozenset(
        f"train.{name}" for name in ("micro_batch", "save_every", "keep_last", "wandb", "tensorboard", "hang_seconds")
    )
    | frozenset(f"train.{name}" for name in ("pass_order", "activation_checkpointing"))
    | frozenset(f"train.{name}" for name in ("recompute_every", "offload_activations"))
    | frozenset(f"train.{name}" for name in ("eval_every", "eval_samples", "eval_max_new_tokens", "best_by"))
)
"""Options that a resumed run may change: where things lie, and what leaves the losses alone up to rounding."""


def check_same_model(path: Path, model: W2R2) -> None:
    """Refuse a checkpoint of another model."""
    refuse_other_model(read_description(path)["model"], model, path / DESCRIPTION)


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
    saved = read_description(path).get("data")  # None in checkpoints of before
    for source, mine, theirs in zip(config.data.train, data, data if saved is None else saved, strict=True):
        if mine != theirs:
            raise ValueError(
                f"{Path(config.data.root) / source.path} is not the data set that {path} was trained on; a resumed run "
                "goes on as it began: prepare it as before, or give a new --out."
            )
