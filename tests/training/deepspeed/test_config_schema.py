"""Every key of the DeepSpeed JSON has a type and a range; sections that have no effect raise."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from w2r2_ds.training.deepspeed.config import resolve_ds_config
from w2r2_ds.training.deepspeed.config_schema import KEYS

Z3 = {"stage": 3}


def resolve(raw: dict[str, Any]) -> dict[str, Any]:
    return resolve_ds_config(
        copy.deepcopy(raw), path="ds.json", global_batch=4, micro_batch=2, world_size=1, bf16=False
    )


def offload(kind: str, stage: int, **section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, f"offload_{kind}": {"device": "cpu", **section}}}


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        *(
            ({"gradient_clipping": value}, "gradient_clipping")
            for value in ("1.0", None, math.nan, math.inf, -1.0, True)
        ),
        *(({"steps_per_print": value}, "steps_per_print") for value in (0, -1, 1.5, "inf", None, True)),
        *(({"wall_clock_breakdown": value}, "wall_clock_breakdown") for value in ("true", 1, None)),
        ({"gradient_predivide_factor": 0.0}, "gradient_predivide_factor"),
        ({"gradient_predivide_factor": 2.0, "zero_optimization": Z3}, "gradient_predivide_factor"),
        ({"prescale_gradients": True, "zero_optimization": {"stage": 2}}, "prescale_gradients"),
        ({"communication_data_type": "fp8"}, "communication_data_type"),
        ({"log_level": "loud"}, "log_level"),
        ({"data_types": {"grad_accum_dtype": "half-ish"}}, "data_types.grad_accum_dtype"),
        ({"data_types": None}, "data_types"),
        ({"checkpoint": {"tag_validation": "perhaps"}}, "checkpoint.tag_validation"),
        ({"checkpoint": {"parallel_write": {"pipeline_stage": "yes"}}}, "checkpoint.parallel_write.pipeline_stage"),
        ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step"),
        ({"flops_profiler": {"recompute_fwd_factor": math.nan}}, "flops_profiler.recompute_fwd_factor"),
        ({"aio": {"block_size": "1M"}}, "aio.block_size"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2.5}}, "zero_optimization.stage"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, "zero_optimization.sub_group_size"),
        (offload("param", 2), "zero_optimization.offload_param"),
        (offload("param", 0), "zero_optimization.offload_param"),
        (offload("optimizer", 0), "zero_optimization.offload_optimizer"),
        (offload("param", 3, device="nvme"), "nvme_path"),
        (offload("optimizer", 3, device="nvme"), "nvme_path"),
        (offload("optimizer", 2, ratio=0.5), "zero_optimization"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "zero_optimization.cpu_offload "),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "zero_optimization.cpu_offload_param"),
        ({"zero_optimization": {"stage": 2, "leaf_module": {"names": ["x"]}}}, "zero_optimization.leaf_module"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weigh"),
        ({"aio": {"block_size": 1}, "zero_optimization": Z3}, "aio"),
        ({"gradient_clipping": 10**400}, "gradient_clipping"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_wrong_value_raises_with_file_and_key(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(raw)
    message = str(caught.value)
    assert message.startswith("ds.json: ") and message.endswith(".") and "\n" not in message
    assert key in message and len(message) < 400


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [[], [1], None, "auto-ish"], ids=str)
def test_every_key_has_a_type(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        resolve({key: value})


@pytest.mark.parametrize("key", [key for key, kind in KEYS.items() if isinstance(kind, dict)])
def test_sections_have_known_keys(key: str) -> None:
    with pytest.raises(ValueError, match=rf'unknown key "{key}\.xyzzy"'):
        resolve({key: {"xyzzy": 1}})


@pytest.mark.parametrize("written", ["3", 3.0, 3, " 3", "+3", "3.0", "03"])
def test_the_stage_is_an_integer_for_every_reader(written: Any) -> None:
    """DeepSpeed converts it; the package and transformers compare the JSON's value with 3."""
    stage = resolve({"zero_optimization": {"stage": written}})["zero_optimization"]["stage"]
    assert stage == 3 and type(stage) is int


def test_a_partition_size_sees_the_converted_stage() -> None:
    section = {"stage": "3", "zero_hpz_partition_size": "auto"}
    assert resolve({"zero_optimization": section})["zero_optimization"]["zero_hpz_partition_size"] == 1


@pytest.mark.parametrize("kind", ["param", "optimizer"])
def test_nvme_without_deepspeeds_operator_raises(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    raw = offload(kind, 3, device="nvme", nvme_path="/nvme")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    resolve(raw | {"aio": {"block_size": 1, "use_gds": False}})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ValueError, match=rf"ds.json: .*offload_{kind}.*async_io"):
        resolve(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"gradient_clipping": 0, "steps_per_print": 1, "log_level": "warning", "communication_data_type": "bf16"},
        {"checkpoint": {"tag_validation": "WARN"}},
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "zero_quantized_weights": False}},
        {"flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None}},
        {"gradient_predivide_factor": 2, "prescale_gradients": True, "zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
        offload("optimizer", 1),
        offload("param", 3),
    ],
)
def test_right_values_are_accepted(raw: dict[str, Any]) -> None:
    resolve(raw)
