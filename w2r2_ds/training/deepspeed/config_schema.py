"""Keys, types and ranges of the DeepSpeed JSON, and settings that DeepSpeed ignores or rejects together.

DeepSpeed has pydantic models for some sections. It ignores unknown keys of the others, and uses their values unchecked:
a wrong one would raise after the weights are loaded, or change training without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from w2r2_ds.config.cli import did_you_mean

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Factor = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
GradAccumDtype = Literal["fp32", "bf16"]
MAX_SHOWN = 100
"""Maximum number of characters of a wrong value in a message."""

CHECKPOINT = {  # the other keys of this section are set by this package (training/build.py)
    "tag_validation": Annotated[str, Field(pattern="^(?i:ignore|warn|fail)$")],
    "parallel_write": {"pipeline_stage": Flag},
}
FLOPS_PROFILER = {
    **dict.fromkeys(("enabled", "detailed"), Flag),
    **dict.fromkeys(("profile_step", "top_modules"), Count),
    "recompute_fwd_factor": Factor,
    "module_depth": Annotated[int, Field(strict=True, ge=-1)],
    "output_file": str | None,
}
AIO = {
    **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), Count),
    **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), Flag),
}
KEYS: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), Count),
    "steps_per_print": Count,
    "gradient_clipping": Factor,
    "gradient_predivide_factor": Annotated[Factor, Field(gt=0)],
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients"), Flag),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"), Flag),
    "communication_data_type": Literal["fp32", "bf16", "fp16"],
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    "data_types": {"grad_accum_dtype": GradAccumDtype},
    "checkpoint": CHECKPOINT,
    "flops_profiler": FLOPS_PROFILER,
    "aio": AIO,
}
"""Keys that DeepSpeed does not validate. A dict is a section."""
DEPRECATED_OFFLOAD = {"offload_param": "cpu_offload_param", "offload_optimizer": "cpu_offload"}
"""Sections of DeepSpeed's ZeRO configuration, and the flags that they have replaced."""
STAGE_3_ONLY = ("leaf_module", "zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Sections and flags that DeepSpeed ignores below stage 3."""


def validate(config: dict[str, Any], path: object) -> None:
    """Raise ValueError with the file and the key of the first unknown key, wrong value or ignored section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    schema = _schema()
    try:
        zero = dict(schema(**config))["zero_optimization"] or DeepSpeedZeroConfig()
    except ValidationError as failure:
        error = failure.errors()[0]
        location = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            section = location.rpartition(".")[0]
            known = [key for key in _key_paths(schema) if key.rpartition(".")[0] == section]
            raise ValueError(f'{path}: unknown key "{location}"{did_you_mean(location, known)}.') from None
        value = json.dumps(error["input"], default=str)
        value = value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
        raise ValueError(f"{path}: {location} is {value}: {error['msg'].rstrip('.')}.") from None
    _check_combinations(config, zero, path)


def normalise_stage(zero: dict[str, Any], path: object) -> None:
    """Replace a ZeRO stage that DeepSpeed reads as an integer, such as "3", "3.0" or 3.0, by the integer; in place.

    Raises:
        ValueError: it is true or false, which DeepSpeed reads as 1 or 0.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    stage = zero.get("stage", 0)
    if isinstance(stage, bool):
        raise ValueError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; write 0, 1, 2 or 3.")
    with suppress(ValidationError):  # reported by `validate`
        zero["stage"] = int(TypeAdapter(ZeroStageEnum).validate_python(stage))


def _check_combinations(config: dict[str, Any], zero: DeepSpeedZeroConfig, path: object) -> None:
    """Raise ValueError for a section or a flag that the ZeRO stage ignores, or that lacks a value or a library.

    Args:
        config: the JSON.
        zero: its section `zero_optimization`, in which DeepSpeed has replaced deprecated keys (`cpu_offload`).
        path: the file, for messages.
    """
    section = config.get("zero_optimization") or {}
    stage = section.get("stage", 0)
    for name, first, effect in (
        ("offload_param", 3, "weights are sharded from stage 3 on"),
        ("offload_optimizer", 1, "optimizer states are sharded from stage 1 on"),
    ):
        offload = getattr(zero, name)
        device = "none" if offload is None else offload.device
        deprecated = DEPRECATED_OFFLOAD[name]
        key = f"{path}: zero_optimization.{deprecated if section.get(deprecated) else name}"
        if device != "none" and stage < first:
            raise ValueError(f"{key} has no effect at stage {stage}: {effect}; remove it or use stage {first}.")
        if device == "nvme":
            if not offload.nvme_path:
                raise ValueError(f"{key}.device is nvme; set {name}.nvme_path to a folder on an NVMe disk.")
            _require_aio(key)
    for name in STAGE_3_ONLY:
        if section.get(name) and stage < 3:
            raise ValueError(
                f"{path}: zero_optimization.{name} has no effect at stage {stage}; remove it or use stage 3."
            )
    offloads = [each for each in (zero.offload_param, zero.offload_optimizer) if each is not None]
    if config.get("aio") and not any(each.device == "nvme" for each in offloads):
        raise ValueError(f"{path}: aio has no effect, because nothing is offloaded to nvme; remove it.")
    for name, default in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
        value = config.get(name, default)
        if stage >= 2 and section.get("reduce_scatter", True) and value != default:
            raise ValueError(
                f"{path}: {name} is {json.dumps(value)}, which stage {stage} does not support; remove it (gradients "
                "are divided by the number of ranks after the reduction)."
            )


def _require_aio(key: str) -> None:
    """Raise ValueError if DeepSpeed cannot build its operator for files on NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f"{key}.device is nvme, but DeepSpeed cannot build its operator async_io here; install the package "
            'libaio-dev of the system, or use the device "cpu".'
        )


def _schema() -> type[BaseModel]:
    """Pydantic model of the JSON: DeepSpeed's own models for its sections, `KEYS` for the rest."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    return _model("DeepSpeedJson", sections | KEYS)


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    """A pydantic model with optional fields; unknown keys are errors, and so is null."""
    definitions: dict[str, Any] = {
        field: (_model(field, kind) if isinstance(kind, dict) else kind, None) for field, kind in fields.items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **definitions)


def _key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Key paths of a pydantic model, including those of its sections."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        yield path
        for kind in (field.annotation, *get_args(field.annotation)):  # an optional section is a union with None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _key_paths(kind, f"{path}.")
