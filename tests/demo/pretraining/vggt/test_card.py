"""The card of a tiny VGGT: hashes, errors and text of the weights in a folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from w2r2_ds.demo.pretraining.card_files import CARD, TEXT
from w2r2_ds.demo.pretraining.vggt import card
from w2r2_ds.demo.pretraining.vggt.errors import VGGTErrors
from w2r2_ds.demo.pretraining.vggt.initialise import CONFIG
from w2r2_ds.demo.pretraining.vggt.scenes import VGGTSettings
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.loading import save_vggt
from w2r2_ds.models.vggt.model import VGGT


@pytest.mark.slow
def test_a_card_describes_the_files_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the errors of an untrained model on one room."""
    monkeypatch.setattr(card, "VAL_ROOMS", 1)
    monkeypatch.setattr(card, "BASELINE_ROOMS", 1)
    save_vggt(VGGT(CONFIG, HEADS).to(torch.bfloat16), tmp_path)
    settings = VGGTSettings(steps=7)
    card.write_card(tmp_path, settings, {"seconds": 120, "first_losses": [], "curve": []})
    written = json.loads((tmp_path / CARD).read_text())
    assert written["settings"] == asdict(settings) and written["seconds"] == 120
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert written["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert set(written["files"]) == {"config.json", "model.safetensors"}
    # bfloat16: two bytes a parameter.
    assert 0 < len(weights) - 2 * written["parameters"] < 50_000
    for views in ("spread", "near"):
        assert all(VGGTErrors(**errors).depth > 0 for errors in written["errors"][views].values())
    assert written["errors"]["spread"]["constants"]["rotation"] > written["errors"]["near"]["constants"]["rotation"]
    text = (tmp_path / TEXT).read_text()
    assert text == card.card_text(written)
    assert "7 steps" in text and "2 minutes" in text
    assert f"| near | model | {written['errors']['near']['model']['depth']:.3g} |" in text
