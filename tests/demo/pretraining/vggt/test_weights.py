"""The shipped tiny VGGT: files, loading, and depth of a room that is not in its training."""

from __future__ import annotations

import json
from typing import Any

import pytest

from w2r2_ds.demo.pretraining.card_files import CARD, TEXT, file_hashes
from w2r2_ds.demo.pretraining.vggt.card import WEIGHTS, card_text, view_batch
from w2r2_ds.demo.pretraining.vggt.errors import baseline, evaluate
from w2r2_ds.demo.pretraining.vggt.room_views import RoomViews
from w2r2_ds.demo.pretraining.vggt.scenes import SPREAD
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.loading import load_vggt

MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return dict(json.loads((WEIGHTS / CARD).read_text()))


def test_files_are_those_of_the_card(card: dict[str, Any]) -> None:
    assert set(card["files"]) == {"config.json", "model.safetensors"}
    assert card["files"] == file_hashes(WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < MAX_BYTES
    assert (WEIGHTS / TEXT).read_text() == card_text(card)


def test_heads_are_loaded_on_request_only(card: dict[str, Any]) -> None:
    assert load_vggt(WEIGHTS).heads == ()
    vggt = load_vggt(WEIGHTS, HEADS)
    assert vggt.heads == HEADS
    assert sum(parameter.numel() for parameter in vggt.parameters()) == card["parameters"]


def test_depth_of_another_room_is_better_than_a_constant() -> None:
    """Against the constants of the room itself, which no prediction without images could know."""
    batch = view_batch(RoomViews(0, "val"), SPREAD, range(100, 101))
    found, constants = evaluate(load_vggt(WEIGHTS, HEADS), [batch]), baseline([batch], batch)
    assert found.depth < 0.6 * constants.depth
    assert found.points < constants.points
