"""The DeepSpeed JSON: read strictly, "auto" filled from the run's configuration, contradictions refused; the start.

The JSON is the one place for ZeRO, precision, offload and clipping; batch sizes, optimizer, schedule and logging
belong to the run's configuration.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w2r2_ds.training.deepspeed.hpz import fill_hierarchy, ranks_per_machine
from w2r2_ds.training.deepspeed.sections import check_sections, unknown

AUTO = "auto"
KNOWN = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "bf16",
        "fp16",
        "gradient_clipping",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "data_types",
        "checkpoint",
        "aio",
        "comms_logger",
        "flops_profiler",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "log_level",
    }
)
"""DeepSpeed's top-level keys that change something here and leave the rest of the project right."""
REFUSED = {
    "optimizer": "the optimizer belongs to the run's configuration (train.lr, train.merger_lr, train.weight_decay)",
    "scheduler": "the schedule belongs to the run's configuration (train.steps, train.warmup_ratio)",
    "activation_checkpointing": "it belongs to the run's configuration (train.activation_checkpointing)",
    "tensorboard": "logging belongs to the run's configuration (train.tensorboard)",
    "wandb": "logging belongs to the run's configuration (train.wandb)",
    "csv_monitor": "metrics are always written to metrics.jsonl",
    "amp": "precision is bf16 or float32 (model.dtype)",
    "torch_autocast": "precision is bf16 or float32 (model.dtype)",
    "gradient_allreduce_op": "the loop needs DeepSpeed's mean over ranks",
    "managed_gradient_accumulation": "the loop needs DeepSpeed's own accumulation",
}
"""Keys of DeepSpeed with an owner elsewhere, and why."""


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; a key given twice is an error.

    Raises:
        ValueError: missing, unreadable, or not a JSON object; one sentence that names the file.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the DeepSpeed JSON: {error.strerror}; give --deepspeed a file such as "
            "ds_configs/zero3.json."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not a valid DeepSpeed JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: not a valid DeepSpeed JSON: it must be an object in braces.")
    return raw


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
    """Fill "auto" from the run's configuration; ``raw`` is left as it is.

    Args:
        raw: of `load_ds_config`.
        path: the file, for messages.
        global_batch: samples per optimizer step over all ranks and accumulation steps.
        micro_batch: samples per forward per rank.
        world_size: ranks.
        bf16: whether weights and activations are bfloat16 (else float32).
        local_size: ranks on this machine; None for what the launcher says.

    Returns:
        What `deepspeed.initialize` takes, without any "auto".

    Raises:
        ValueError: the JSON contradicts the configuration, holds what this project cannot honour or what DeepSpeed
            does not know.
    """
    _check_keys(raw, path)
    per_pass = micro_batch * world_size
    if global_batch % per_pass:
        raise ValueError(
            f"train.global_batch is {global_batch}, not divisible by train.micro_batch {micro_batch} x {world_size} "
            f"ranks = {per_pass}; change train.global_batch, train.micro_batch or the number of ranks."
        )
    accumulation = global_batch // per_pass
    config = copy.deepcopy(raw)
    _fill(config, "train_batch_size", global_batch, f"train.global_batch is {global_batch}", path)
    _fill(config, "train_micro_batch_size_per_gpu", micro_batch, f"train.micro_batch is {micro_batch}", path)
    _fill(
        config,
        "gradient_accumulation_steps",
        accumulation,
        f"train.global_batch {global_batch} / (train.micro_batch {micro_batch} x {world_size} ranks) is {accumulation}",
        path,
    )
    section = config.setdefault("bf16", {})
    if not isinstance(section, dict):
        raise ValueError(f'{path}: bf16 is {_show(section)}; write {{"enabled": "auto"}}.')
    dtype = "bfloat16" if bf16 else "float32"
    _fill(section, "enabled", bf16, f"model.dtype resolves to {dtype} on this machine", path, "bf16.")
    own = "the optimizer is the run configuration's AdamW"
    _fill(config, "zero_allow_untested_optimizer", True, own, path)
    _fill(config, "zero_force_ds_cpu_optimizer", False, own, path)
    if isinstance(zero := config.get("zero_optimization"), dict):
        fill_hierarchy(zero, path, world_size, local_size or ranks_per_machine(world_size))
    for where in _autos(config):
        raise ValueError(
            f'{path}: {where} is "auto", which nothing here can fill; write a value or leave the key out '
            f"for DeepSpeed's default."
        )
    check_sections(config, path)
    return config


def _check_keys(raw: dict[str, Any], path: str | Path) -> None:
    """Refuse top-level keys by name, and fp16."""
    for key in raw:
        if key in REFUSED:
            raise ValueError(f'{path}: remove "{key}": {REFUSED[key]}.')
        if key not in KNOWN:
            raise ValueError(f"{path}: {unknown(key, KNOWN)}; known are {', '.join(sorted(KNOWN))}.")
    fp16 = raw.get("fp16", {})
    if not isinstance(fp16, dict) or fp16.get("enabled", False) is not False:
        raise ValueError(
            f'{path}: fp16 is not supported, its range is too small for these models; remove "fp16" and use '
            f'"bf16": {{"enabled": "auto"}} with model.dtype bfloat16.'
        )


def _fill(
    section: dict[str, Any], key: str, value: int | bool, because: str, path: str | Path, prefix: str = ""
) -> None:
    """Set ``section[key]`` where it is missing or "auto"; refuse another value."""
    given = section.get(key, AUTO)
    if given != AUTO and (type(given) is not type(value) or given != value):
        raise ValueError(
            f'{path}: {prefix}{key} is {_show(given)}, but {because}; write "auto" or {_show(value)} in the JSON, '
            f"or change the run's configuration."
        )
    section[key] = value


def _autos(value: Any, where: str = "") -> Iterator[str]:
    """Key paths of what is still "auto"."""
    if value == AUTO:
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{where}[{index}]")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f'the key "{key}" is given twice')
        result[key] = value
    return result


def _show(value: Any) -> str:
    """As the JSON writes it."""
    return json.dumps(value)
