"""Fixture: a tiny VGGT with all heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from w2r2_ds.models.vggt.config import HEADS, VGGTConfig
from w2r2_ds.models.vggt.loading import save_vggt
from w2r2_ds.models.vggt.model import VGGT


@pytest.fixture(scope="module")
def hint_vggt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random VGGT of two layers, patches of 14 pixels, with all heads."""
    config = VGGTConfig(
        img_size=112,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=2,
        patch_embed="conv",
        camera_num_heads=2,
        camera_trunk_depth=1,
        dpt_features=8,
        dpt_out_channels=(8, 8, 8, 8),
        dpt_layers=(0, 0, 1, 1),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = VGGT(config, HEADS)
    folder = tmp_path_factory.mktemp("hint") / "vggt"
    save_vggt(model, folder)
    return folder
