"""Read the DeepSpeed JSON, fill its "auto" values from the run's configuration, and validate it.

The JSON sets ZeRO, precision, offload and gradient clipping. The run's configuration sets batch sizes, optimizer,
learning-rate schedule and logging; DeepSpeed's values for them must be "auto", equal or absent.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w2r2_ds.training.deepspeed.config_schema import normalise_stage, validate
from w2r2_ds.training.deepspeed.hpz import fill_hpz
from w2r2_ds.utils.distributed import local_world_size
from w2r2_ds.utils.files.json_io import read_json_object

AUTO = "auto"
MANY_MICRO_BATCHES = 8
"""Number of accumulation steps from which gradients are accumulated in float32 by default.

A sum of n similar values loses about log2(n) of bfloat16's 8 bits: 3 of them with 8 micro-batches.
"""
OWNED_BY_THE_RUN = {
    "optimizer": "train.lr, train.merger_lr and train.weight_decay",
    "scheduler": "train.steps and train.warmup_ratio",
    "activation_checkpointing": "train.activation_checkpointing",
    "tensorboard": "train.trackers",
    "wandb": "train.trackers",
    "csv_monitor": "metrics.jsonl, which is always written",
    "timers": "metrics.jsonl has samples, tokens and FLOPs per second",
}
"""Sections of DeepSpeed that are not allowed in the JSON, with the options of the run that replace them."""


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: the file is missing, unreadable or not a JSON object, or a key occurs twice.
    """
    return read_json_object(path, "a DeepSpeed JSON such as ds_configs/zero3.json (--deepspeed)")


def resolve_ds_config(
    raw: dict[str, Any],
    *,
    path: str | Path,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    bf16: bool,
    local_size: int | None = None,
) -> dict[str, Any]:
    """Fill "auto" from the run's configuration and validate the result; ``raw`` is not changed.

    Args:
        raw: result of `load_ds_config`.
        path: the file, for messages.
        global_batch: samples per optimizer step over all ranks and accumulation steps.
        micro_batch: samples per forward per rank.
        world_size: number of ranks.
        bf16: whether weights and activations are bfloat16 (else float32).
        local_size: ranks on this machine; by default from the launcher's environment variables.

    Returns:
        The configuration for `deepspeed.initialize`, without any "auto".

    Raises:
        ValueError: the JSON contradicts the run's configuration, or has an unknown key or a wrong value.
    """
    config = copy.deepcopy(raw)
    _fill_batch_sizes(config, path, global_batch, micro_batch, world_size)
    # Without these keys DeepSpeed supports only some optimizers with ZeRO, and with CPU offload only its own.
    optimizer = "the optimizer is the run configuration's AdamW"
    _fill(config, "zero_allow_untested_optimizer", True, optimizer, path)
    _fill(config, "zero_force_ds_cpu_optimizer", False, optimizer, path)
    dtype = f"model.dtype resolves to {'bfloat16' if bf16 else 'float32'} on this machine"
    # `validate` reports a section that is not a dict.
    if isinstance(section := config.setdefault("bf16", {}), dict):
        _fill(section, "enabled", bf16, dtype, path, "bf16.")
    if isinstance(section := config.get("fp16"), dict):
        _fill(section, "enabled", False, f"{dtype}, and the range of fp16 is too small; use bf16", path, "fp16.")
    if isinstance(section := config.get("zero_optimization"), dict):
        normalise_stage(section, path)
        fill_hpz(section, path, world_size, local_size or local_world_size(world_size))
        # By default DeepSpeed replaces `torch.nn.functional.linear` for the whole process; it then rounds differently.
        linear = "torch.nn.functional.linear must stay PyTorch's, so that features do not depend on the ZeRO stage"
        _fill(section, "memory_efficient_linear", False, linear, path, "zero_optimization.")
    if isinstance(section := config.setdefault("data_types", {}), dict):
        zero = config.get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        _fill_grad_accum_dtype(section, config["gradient_accumulation_steps"], stage, bf16, path)
    for location in _auto_paths(config):
        raise ValueError(
            f'{path}: {location} is "auto", but no option of the run fills it; write a value, or remove the key to use '
            "DeepSpeed's default."
        )
    _check_sections(config, path)
    validate(config, path)
    # DeepSpeed's throughput timer synchronises the whole device before and after every micro-batch. It is not read.
    config["timers"] = {"throughput": {"enabled": False}}
    return config


def _fill_batch_sizes(
    config: dict[str, Any], path: str | Path, global_batch: int, micro_batch: int, world_size: int
) -> None:
    """Fill the batch sizes and the number of accumulation steps."""
    per_pass = micro_batch * world_size
    if global_batch % per_pass:
        raise ValueError(
            f"train.global_batch is {global_batch}, not divisible by train.micro_batch {micro_batch} x {world_size} "
            f"ranks = {per_pass}; change train.global_batch, train.micro_batch or the number of ranks."
        )
    # DeepSpeed requires train_batch_size = micro_batch x accumulation x world_size.
    accumulation = global_batch // per_pass
    sizes = f"train.global_batch {global_batch} / (train.micro_batch {micro_batch} x {world_size} ranks)"
    _fill(config, "train_batch_size", global_batch, f"train.global_batch is {global_batch}", path)
    _fill(config, "train_micro_batch_size_per_gpu", micro_batch, f"train.micro_batch is {micro_batch}", path)
    _fill(config, "gradient_accumulation_steps", accumulation, f"{sizes} is {accumulation}", path)


def _fill_grad_accum_dtype(
    section: dict[str, Any], accumulation: int, stage: Any, bf16: bool, path: str | Path
) -> None:
    """Fill the dtype in which the gradients of micro-batches are added up, unless the JSON sets it."""
    if not bf16:
        _fill(section, "grad_accum_dtype", "fp32", "model.dtype resolves to float32", path, "data_types.")
    elif stage == 0:
        _fill(section, "grad_accum_dtype", "bf16", "stage 0 supports the dtype of the model only", path, "data_types.")
    elif section.get("grad_accum_dtype", AUTO) == AUTO:
        # 4 instead of 2 bytes per trained parameter, divided by the number of ranks. Not at stage 1, where DeepSpeed
        # would use another optimizer, with checkpoints of another format.
        many = accumulation >= MANY_MICRO_BATCHES and stage != 1
        section["grad_accum_dtype"] = "fp32" if many else "bf16"


def _fill(
    section: dict[str, Any], key: str, value: int | bool | str, reason: str, path: str | Path, prefix: str = ""
) -> None:
    """Set ``section[key]`` if it is missing or "auto"; raise ValueError with `reason` if it has another value."""
    given = section.get(key, AUTO)
    # True == 1 in Python, but not in JSON: compare types too.
    if given != AUTO and (type(given) is not type(value) or given != value):
        raise ValueError(
            f'{path}: {prefix}{key} is {json.dumps(given)}, but {reason}; write "auto" or {json.dumps(value)} in the '
            "JSON, or change the run's configuration."
        )
    section[key] = value


def _auto_paths(value: Any, location: str = "") -> Iterator[str]:
    """Key paths whose value is still "auto"; DeepSpeed's models would silently use their default instead."""
    if value == AUTO:
        yield location
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _auto_paths(inner, f"{location}.{key}" if location else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _auto_paths(inner, f"{location}[{index}]")


def _check_sections(config: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError if a section sets what the run's configuration sets."""
    for key, owner in OWNED_BY_THE_RUN.items():
        if key in config:
            raise ValueError(f'{path}: remove "{key}"; the run\'s configuration sets it: {owner}.')
