"""The shipped weights are those of their card; a short run gives the recorded losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.demo.pretraining.card_files import CARD, TEXT, file_hashes
from w2r2_ds.demo.pretraining.pair.card import SHORT, card_text, short_run
from w2r2_ds.demo.pretraining.pair.encoders import geometry_config
from w2r2_ds.models.weights.loading import load_tokenizer, load_vlm


@pytest.fixture(scope="module")
def card(shipped: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((shipped / CARD).read_text())
    return content


def test_the_card_has_the_hash_of_every_file(shipped: Path, card: dict[str, Any]) -> None:
    assert file_hashes(shipped) == card["files"] and "vlm/model.safetensors" in card["files"]
    assert (shipped / TEXT).read_text() == card_text(card)


def test_the_weights_are_small(shipped: Path) -> None:
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 10e6


def test_the_weights_are_bfloat16_numbers(shipped: Path) -> None:
    vlm = load_vlm(str(shipped / "vlm"), torch.float32, "sdpa")
    for parameter in vlm.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_short_run_gives_the_recorded_losses(shipped: Path, card: dict[str, Any]) -> None:
    """With the instructions of AVX-512, AVX2 and SSE they differed by 3e-6 of their values."""
    assert {name: getattr(SHORT, name) for name in card["short_run"]["settings"]} == card["short_run"]["settings"]
    recorded = card["short_run"]["losses"]
    found = short_run(load_tokenizer(shipped / "vlm"), geometry_config("point_map"))
    assert found.keys() == recorded.keys()
    for stage, losses in recorded.items():
        for step, values in enumerate(losses):
            assert found[stage][step] == pytest.approx(values, rel=1e-3), (stage, step)
