"""Check that a run may resume from a checkpoint: same model, same options, same training sets."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2r2_ds.config.io import load_config
from w2r2_ds.config.options import options
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.models.build import fingerprint
from w2r2_ds.training.checkpoint.manifest import MANIFEST, read_manifest
from w2r2_ds.utils import plugins

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    "data": {"root", "workers", "decode_threads", "prefetch", "packing", "cache", "cache_gib", "cached_features"},
    "model": {"vlm", "geometry.path", "merger", "attention", "kernels"},
    "objective": {"decode_gap_every", "decode_gap_samples"},
    "train": {"micro_batch", "save_every", "keep_last", "trackers", "hang_seconds", "pass_order", "shard_vision_tower"}
    | {"activation_checkpointing", "recompute_every", "offload_activations"}
    | {"eval_every", "eval_samples", "eval_max_new_tokens", "best_by", "samples_every", "report"},
}
"""Options that a resumed run may change, by section: paths, logging, and options that change losses by rounding only.

All options of the sections that are not listed may change too.
"""


def check_resumable(path: Path, config: RunConfig, zero_stage: int, data: Sequence[str]) -> None:
    """Check that a run may resume from a checkpoint, before any weights are loaded.

    Args:
        path: folder of the checkpoint.
        config: run configuration.
        zero_stage: ZeRO stage of the DeepSpeed JSON.
        data: digests of the training sets, in the order of `data.train` (`data.dataset.digests`).

    Raises:
        ValueError: the checkpoint is of another run, model, training set or ZeRO stage.
    """
    saved = read_manifest(path)
    warn_of_changed_plugins(saved, path)
    check_fingerprint(saved["model"], fingerprint(config.model), path / MANIFEST)
    check_same_run(path, config)
    check_same_data(path, config, data)
    if saved["zero_stage"] != zero_stage:
        raise ValueError(
            f"{path} was saved with ZeRO stage {saved['zero_stage']} and cannot be resumed with stage {zero_stage}; "
            "use the DeepSpeed JSON of its training."
        )


def check_fingerprint(saved: dict[str, Any], configured: dict[str, Any], source: Path) -> None:
    """Check that trained weights fit a model.

    Args:
        saved: fingerprint in the manifest (`models.build.fingerprint`).
        configured: fingerprint of the configured model.
        source: file of the saved fingerprint, for the message.

    Raises:
        ValueError: with the first field that differs.
    """
    for field, value in configured.items():
        if saved.get(field) != value:
            raise ValueError(
                f"{source}: model.{field} is {saved.get(field)!r}, but the configured model has {value!r}; "
                "use the configuration the checkpoint was trained with."
            )


def warn_of_changed_plugins(saved: Mapping[str, Any], path: Path) -> None:
    """Log a warning for every plug-in of this process whose code has changed since a checkpoint was saved.

    Not an error: the change may be a correction without which the run cannot continue.

    Args:
        saved: manifest of the checkpoint.
        path: folder of the checkpoint, for the message.
    """
    imported = {Path(plugin).name: plugin for plugin in plugins.IMPORTED}  # the files may have been moved
    for name, digest in saved.get("plugins", {}).items():
        plugin = imported.get(Path(name).name)
        if plugin is not None and plugins.SHA256[plugin] != digest:
            logger.warning(
                "the plug-in %s has changed since %s was saved; if it changes the model or the loss, results are of "
                "neither version.",
                plugin,
                path,
            )


def check_same_run(path: Path, config: RunConfig) -> None:
    """Raise ValueError with the first option that is not in `MAY_CHANGE` and differs from the checkpoint's."""
    saved = load_config(path / "config.yaml")
    for name in options(RunConfig):
        section, _, field = name.partition(".")
        if section in MAY_CHANGE and field not in MAY_CHANGE[section]:
            before, now = operator.attrgetter(name)(saved), operator.attrgetter(name)(config)
            if before != now:
                raise ValueError(
                    f"{path / 'config.yaml'} has {name} = {before!r}, now it is {now!r}; "
                    "a resumed run cannot change it: use the old value, or a new --out."
                )


def check_same_data(path: Path, config: RunConfig, data: Sequence[str]) -> None:
    """Check that the training sets have the same content as before; otherwise the order of samples would change.

    Args:
        path: folder of the checkpoint.
        config: run configuration.
        data: digests of the training sets, in the order of `data.train`.

    Raises:
        ValueError: with the first set that differs.
    """
    for source, digest, saved_digest in zip(config.data.train, data, read_manifest(path)["data"], strict=True):
        if digest != saved_digest:
            raise ValueError(
                f"{Path(config.data.root) / source.path} is not the data set that {path} was trained on; prepare it as "
                "before, or use a new --out."
            )
