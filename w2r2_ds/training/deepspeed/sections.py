"""The sections of the DeepSpeed JSON by DeepSpeed's own models, so that a misspelt key is named before weights load.

Some sections DeepSpeed reads by name and ignores whatever else they hold; there a misspelt key would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from w2r2_ds.config.cli import did_you_mean


def check_sections(config: dict[str, Any], path: str | Path) -> None:
    """Refuse an unknown key or a wrong value in any section.

    Args:
        config: of `resolve_ds_config`, without any "auto".
        path: the file, for messages.

    Raises:
        ValueError: one sentence that names the file, the key and, of an unknown one, those that it may stand for.
    """
    for name, model in models().items():
        section = _object(config, name, path)
        try:
            model(**section)
        except ValidationError as error:
            raise ValueError(f"{path}: {_sentence(error.errors()[0], name, model)}.") from None
        except AssertionError as error:  # of an old name and its new one together
            raise ValueError(f"{path}: {name}: {error}.") from None
    for name, known in plain_sections().items():
        for key in _object(config, name, path):
            if key not in known:
                raise ValueError(f"{path}: {unknown(f'{name}.{key}', known, name)}.")


def models() -> dict[str, type[BaseModel]]:
    """DeepSpeed's model of a section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }


def plain_sections() -> dict[str, set[str]]:
    """The keys that DeepSpeed reads of a section for which it has no model."""
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    return {
        "flops_profiler": set(vars(DeepSpeedFlopsProfilerConfig({}))),
        "aio": set(AIO_DEFAULT_DICT),
        "checkpoint": {
            constants.CHECKPOINT_TAG_VALIDATION,
            constants.CHECKPOINT_PARALLEL_WRITE,
        },  # how and where files are written, and when the universal form is read, is training/checkpoint/save.py's
        "data_types": {
            constants.GRAD_ACCUM_DTYPE,
            constants.PARAM_DTYPE,
            constants.BUFFER_DTYPE,
            constants.KEEP_IN_FP32_MODULES,
        },
    }


def unknown(key: str, known: Iterable[str], section: str = "") -> str:
    """What is said of a key that DeepSpeed does not know."""
    names = [f"{section}.{name}" if section else name for name in known]
    return f'unknown key "{key}"{did_you_mean(key, names)}'


def _object(config: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    """A section, empty where it is missing."""
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name} is {section!r}; it must be an object in braces.")
    return section


def _sentence(error: Any, name: str, model: type[BaseModel]) -> str:
    """One of pydantic's errors, without its full stop."""
    where = ".".join([name, *map(str, error["loc"])])
    if error["type"] != "extra_forbidden":
        return f"{where} is {error['input']!r}: {error['msg'].rstrip('.')}"
    for step in error["loc"][:-1]:
        inner = _inner(model, str(step))
        if inner is None:
            return unknown(where, [])
        model = inner
    known = [field.alias or key for key, field in model.model_fields.items()]
    return unknown(where, known, where.rpartition(".")[0])


def _inner(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of a section inside another one."""
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            kinds = (field.annotation, *get_args(field.annotation))
            return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return None
