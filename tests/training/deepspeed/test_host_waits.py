"""How often a whole optimizer step under ZeRO-3 makes the host wait for the GPU, with every JSON of ds_configs/."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import host_waits
from runs import ZERO3, run_ranks
from w2r2_ds.demo.tiny_models import build_tiny_vlm
from zero3_cases import Case

pytestmark = pytest.mark.distributed

LAYERS, MICRO_BATCHES = 4, 2
FETCH = "_fetch_sub_module_impl"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, samples: list[Any], model_config: Any) -> dict[str, Any]:
    """DeepSpeed configuration -> waits of the fourth step, on two ranks."""
    folder: Path = tmp_path_factory.mktemp("host_waits")
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    sizes = {"hidden": 64, "intermediate": 338, "vision_hidden": 32, "vision_depth": 2}
    path = build_tiny_vlm(folder / "vlm", texts, 3, layers=LAYERS, **sizes)
    configs = {
        "zero3": shipped("zero3"),
        "without overlap": shipped("zero3", overlap_comm=False),
        "zero3_offload": shipped("zero3_offload"),
        # Last: DeepSpeed keeps its groups of ranks for the rest of the process.
        "zero3_hpz": shipped("zero3_hpz", zero_hpz_partition_size=2),
    }
    case = Case("waits", [[["four"], ["three"]], [["three"], ["four"]]], checkpointing=True)
    config = replace(model_config, vlm=str(path))
    named = {sample.id: sample for sample in samples}
    (folder / "cases.pkl").write_bytes(pickle.dumps((case, config, named, configs)))
    run_ranks(2, Path(host_waits.__file__), folder)
    return dict(json.loads((folder / "found.json").read_text()))


def shipped(name: str, **changes: Any) -> dict[str, Any]:
    """A file of ds_configs/. All matrices are partitioned, as at real size."""
    raw: dict[str, Any] = json.loads(ZERO3.with_name(f"{name}.json").read_text())
    raw["zero_optimization"] |= {"stage3_param_persistence_threshold": 64} | changes
    return raw


def waits(found: dict[str, Any], name: str) -> dict[str, int]:
    """All waits except those for a gather of weights, which the next layer needs anyway."""
    return {key: number for key, number in found[name]["waits"].items() if not key.startswith("gather: ")}


def expected() -> dict[str, int]:
    """All waits of a step, for any number of layers."""
    each_step = {
        "read: reduce_stats": 1,
        "read: group_norms": 1,
        "read: is_invalid_grad_norm": 1,
        # After the update DeepSpeed gathers the weights that are not partitioned.
        "device: _allgather_params_coalesced": 1,
    }
    # After each backward pass DeepSpeed waits for the reduced gradients, and once per full bucket of them.
    each_micro_batch = {
        "reduce: independent_gradient_partition_epilogue": 1,
        "reduce: __reduce_and_partition_ipg_grads": 1,
    }
    return each_step | {key: number * MICRO_BATCHES for key, number in each_micro_batch.items()}


def test_no_layer_waits_for_computation(found: dict[str, Any]) -> None:
    assert waits(found, "zero3") == expected()


def test_offloaded_optimizer_states_add_a_read_per_group(found: dict[str, Any]) -> None:
    norms = {"read: complete_grad_norm_calculation_for_cpu_offload": 2}
    assert waits(found, "zero3_offload") == expected() | norms


def test_hpz_waits_once_per_trained_tensor(found: dict[str, Any]) -> None:
    """DeepSpeed copies each updated weight to the second partition, and waits for every copy."""
    copies = {"compute: _partition_param_sec": found["zero3_hpz"]["trained"]}
    assert waits(found, "zero3_hpz") == expected() | copies


def test_without_overlap_layers_wait_for_computation(found: dict[str, Any]) -> None:
    """What `overlap_comm` is for, and that the waits are counted."""
    shared = waits(found, "without overlap")[f"compute: {FETCH}"]
    assert shared == found["zero3"]["waits"][f"gather: {FETCH}"] > 10 * LAYERS * MICRO_BATCHES


def test_overlap_does_not_change_the_step(found: dict[str, Any]) -> None:
    for value in ("loss", "grad_norm"):
        assert found["zero3"][value] == found["without overlap"][value]
