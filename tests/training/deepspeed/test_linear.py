"""ZeRO-3 leaves `torch.nn.functional.linear` as it is, and frees the weights between forward and backward pass."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import zero3_linear
from runs import ZERO3, run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, samples: list[Any], model_config: Any) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("linear")
    raw = json.loads(ZERO3.read_text())
    raw["zero_optimization"]["stage3_param_persistence_threshold"] = 64
    named = {sample.id: sample for sample in samples}
    (folder / "cases.pkl").write_bytes(pickle.dumps((model_config, named, raw)))
    run_ranks(1, Path(zero3_linear.__file__), folder)
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("case", zero3_linear.CASES)
def test_linear_is_pytorchs_after_the_engine_is_made(found: dict[str, Any], case: str) -> None:
    """Also after an error while the model was built."""
    assert found[case]["stock"]


@pytest.mark.parametrize("case", zero3_linear.CASES)
def test_features_in_bfloat16_do_not_depend_on_zero3(found: dict[str, Any], case: str) -> None:
    assert found[case]["features"]


@pytest.mark.parametrize("case", zero3_linear.CASES)
def test_no_frozen_weight_of_a_layer_is_kept_for_the_backward_pass(found: dict[str, Any], case: str) -> None:
    """LoRA's matrices and the merger's are small; the LM head's backward pass follows at once."""
    layers = [name for name in found[case]["kept"] if ".layers." in name and "lora_" not in name]
    assert layers == []
    assert any("lora_A" in name for name in found["PEFT"]["kept"])  # views are found


def test_deepspeeds_replacement_changes_features(found: dict[str, Any]) -> None:
    assert found["patched"] == {"stock": False, "features": False}
