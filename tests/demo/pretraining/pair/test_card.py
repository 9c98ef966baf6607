"""The shipped weights are those of their cards; short runs give the recorded losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.demo.assets import PAIRS, WEIGHTS
from w2r2_ds.demo.pretraining.card_files import CARD, TEXT, file_hashes
from w2r2_ds.demo.pretraining.pair.card import SHORT, card_text, short_run
from w2r2_ds.demo.pretraining.pair.encoders import geometry_config
from w2r2_ds.models.weights.loading import load_tokenizer, load_vlm
from w2r2_ds.types.geometry import DemoGeometry


@dataclass(frozen=True)
class Shipped:
    """A pair that the package ships: its geometry encoder, folder and card."""

    geometry: DemoGeometry
    folder: Path
    card: dict[str, Any]


@pytest.fixture(scope="module", params=sorted(PAIRS))
def pair(request: pytest.FixtureRequest) -> Shipped:
    folder = WEIGHTS / PAIRS[request.param]
    return Shipped(request.param, folder, json.loads((folder / CARD).read_text()))


def test_the_card_has_the_hash_of_every_file(pair: Shipped) -> None:
    assert file_hashes(pair.folder) == pair.card["files"] and "vlm/model.safetensors" in pair.card["files"]
    assert (pair.folder / TEXT).read_text() == card_text(pair.card)


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 20e6


def test_the_weights_are_bfloat16_numbers(pair: Shipped) -> None:
    vlm = load_vlm(str(pair.folder / "vlm"), torch.float32, "sdpa")
    for parameter in vlm.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_short_run_gives_the_recorded_losses(pair: Shipped) -> None:
    """With the instructions of AVX-512, AVX2 and SSE they differed by 3e-6 of their values."""
    short = pair.card["short_run"]
    assert {name: getattr(SHORT, name) for name in short["settings"]} == short["settings"]
    found = short_run(load_tokenizer(pair.folder / "vlm"), geometry_config(pair.geometry))
    assert found.keys() == short["losses"].keys()
    for stage, losses in short["losses"].items():
        for step, values in enumerate(losses):
            assert found[stage][step] == pytest.approx(values, rel=1e-3), (stage, step)
