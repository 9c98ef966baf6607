"""Gradient norms per group with accumulation on two ranks, for every ZeRO stage, equal those of whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import norm_ranks
from runs import run_ranks

pytestmark = pytest.mark.distributed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SECTIONS: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 2, overlap": {"stage": 2, "overlap_comm": True},
    "stage 2, offload": {"stage": 2, **OFFLOAD},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "stage 3, sub-groups": {"stage": 3, "sub_group_size": 40},
    "stage 3, offload": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
}
MIXED = "bfloat16 added in float32"
CASES = [
    f"{name}, {dtype}"
    for name, section in SECTIONS.items()
    for dtype in ("float32", "bfloat16", MIXED)
    if section["stage"] or dtype != MIXED  # stage 0 does not support it
]
ACCUMULATIONS = [f"{name}, {dtype}" for name in ("stage 2", "stage 3") for dtype in ("bf16", "fp32")]
MANY = 9
"""Accumulation steps of `ACCUMULATIONS`."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per rank and case: per step, the norms, those of whole gradients, operations and all-reduces."""
    folder: Path = tmp_path_factory.mktemp("norms")
    sizes = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": norm_ranks.MICRO_BATCHES}
    allow = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    configs, accumulations = {}, {}
    for case in CASES:
        name, _, dtype = case.rpartition(", ")
        configs[case] = sizes | allow | {"zero_optimization": SECTIONS[name], "bf16": {"enabled": dtype != "float32"}}
        if dtype == MIXED:
            configs[case]["data_types"] = {"grad_accum_dtype": "fp32"}
    for case in ACCUMULATIONS:
        name, _, dtype = case.rpartition(", ")
        accumulations[case] = configs[f"{name}, bfloat16"] | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MANY,
            "data_types": {"grad_accum_dtype": dtype},
        }
    (folder / "configs.json").write_text(json.dumps([configs, accumulations]))
    run_ranks(2, Path(norm_ranks.__file__), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_the_whole_gradients(found: list[dict[str, Any]], case: str) -> None:
    """Both are computed in float64, from the same values in another order."""
    for rank in found:
        for norms, whole, *_ in rank[case]:
            assert norms == pytest.approx(whole, rel=1e-12)
            assert min(norms.values()) > 0
    assert [step[0] for step in found[0][case]] == [step[0] for step in found[1][case]]


WHOLE = ("stage 0, float32", "stage 0, bfloat16", f"stage 1, {MIXED}")
"""Cases without ZeRO's optimizer: DeepSpeed gives the gradients tensor by tensor."""


@pytest.mark.parametrize("case", [case for case in CASES if case not in WHOLE])
def test_few_operations_and_one_all_reduce(found: list[dict[str, Any]], case: str) -> None:
    """Not one per tensor; the network has nine."""
    sub_groups = 6 if "sub-groups" in case else 2
    for _, _, operations, reductions in found[0][case]:
        assert reductions == 1
        assert operations <= 4 + 9 * sub_groups


@pytest.mark.parametrize("case", ACCUMULATIONS)
def test_bfloat16_loses_small_gradients_of_many_micro_batches(found: list[dict[str, Any]], case: str) -> None:
    """256 + 1 is 256 in bfloat16."""
    exact = case.endswith("fp32")
    for rank in found:
        total, dtype = rank["accumulated"][case]
        assert total == [256.0 + (MANY - 1 if exact else 0)] * 2
        assert dtype == ("torch.float32" if exact else "torch.bfloat16")
