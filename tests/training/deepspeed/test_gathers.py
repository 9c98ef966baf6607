"""The sizes in ds_configs/zero3.json: which layers ZeRO-3 gathers for a 7B model, how often and when.

The decoder layers and the JSON's sizes in parameters are scaled down by one factor.
"""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import scaled_gathers
from runs import ZERO3, run_ranks
from w2r2_ds.demo.tiny_models import build_tiny_vlm
from w2r2_ds.models.weights.loading import meta_model
from zero3_cases import Case

pytestmark = pytest.mark.distributed

LAYERS, VISION_DEPTH = 6, 2
REAL_LAYER = 234_500_000  # of Qwen2.5-VL-7B, with LoRA of rank 16
HIDDEN = 64
SMALL = {"stage3_prefetch_bucket_size": 50_000_000}
"""DeepSpeed's default, a fifth of a layer."""


def scaled(layer: int, **changes: int) -> dict[str, Any]:
    """zero3.json, scaled to layers with this many parameters."""
    raw = copy.deepcopy(json.loads(ZERO3.read_text()))
    zero = raw["zero_optimization"] | changes
    for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance"):
        zero[f"stage3_{name}"] = round(zero[f"stage3_{name}"] * layer / REAL_LAYER)
    # Parameters that are not partitioned at real size: norms, biases and LoRA matrices of narrow projections.
    return raw | {"zero_optimization": zero | {"stage3_param_persistence_threshold": 4 * HIDDEN}}


def lora_numel(layer: nn.Module, rank: int) -> int:
    """Parameters that LoRA adds to a decoder layer."""
    return sum(rank * sum(each.weight.shape) for each in layer.modules() if isinstance(each, nn.Linear))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, samples: list[Any], model_config: Any) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("gathers")
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    # 18944 / 3584 as at real size: a matrix of the MLP is 29 % of a layer.
    sizes = {"hidden": HIDDEN, "intermediate": 338, "vision_hidden": 32, "vision_depth": VISION_DEPTH}
    path = build_tiny_vlm(folder / "vlm", texts, 3, layers=LAYERS, **sizes)
    first = meta_model(path).model.language_model.layers[0]
    layer = sum(parameter.numel() for parameter in first.parameters()) + lora_numel(first, model_config.lora_rank)
    configs = {"shipped": scaled(layer), "small bucket": scaled(layer, **SMALL), "whole tower": scaled(layer)}
    case = Case("gathers", [[["four"]], [["three"]]], checkpointing=True)
    config = replace(model_config, vlm=str(folder / "vlm"))
    named = {sample.id: sample for sample in samples}
    (folder / "cases.pkl").write_bytes(pickle.dumps((case, config, named, configs)))
    run_ranks(2, Path(scaled_gathers.__file__), folder)
    return {"layer": layer} | json.loads((folder / "found.json").read_text())


def test_decoder_layers_are_prefetched(found: dict[str, Any]) -> None:
    """Every layer is fetched while the layer before it runs; a bucket smaller than a layer fetches half of it only."""
    assert found["shipped"]["late"] <= 0.01 * found["shipped"]["elements"]
    assert found["small bucket"]["late"] > 0.3 * found["small bucket"]["elements"]


def test_layers_are_gathered_once_per_pass(found: dict[str, Any]) -> None:
    """Lockstep, the default under ZeRO-3: once for both passes, once for recomputation and backward pass.

    Layers that the forward pass left less than stage3_max_reuse_distance ago are still whole in the backward pass.
    """
    assert found["shipped"]["gathered"] == [2] * (LAYERS - 2) + [1, 1]


def test_a_block_of_the_vision_tower_is_fetched_at_once(found: dict[str, Any]) -> None:
    """One fetch per block and encode, instead of one per norm and linear layer (8); and those of its other layers."""
    patch_embedding, merger = 1, 3
    assert found["shipped"]["tower"] == patch_embedding + VISION_DEPTH + merger


def test_a_whole_vision_tower_is_not_gathered(found: dict[str, Any]) -> None:
    assert found["whole tower"]["tower"] == 0
    assert found["whole tower"]["gathered"] == found["shipped"]["gathered"]
    assert found["whole tower"]["loss"] == found["shipped"]["loss"]


def test_few_layers_are_gathered_at_once(found: dict[str, Any]) -> None:
    """At most stage3_max_live_parameters, plus the two layers that wait for the backward pass."""
    assert found["shipped"]["live"] <= 4 * found["layer"]
