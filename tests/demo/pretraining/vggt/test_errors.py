"""Errors of predictions: those of constants on views whose geometry is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from w2r2_ds.demo.pretraining.vggt.errors import baseline, evaluate
from w2r2_ds.demo.pretraining.vggt.room_views import ViewBatch
from w2r2_ds.models.vggt.config import VGGTConfig
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import HeadOutputs


def wall(degrees: float, metres: float = 2.0) -> ViewBatch:
    """Two cameras at one place; the second is turned about the vertical and one metre higher. Depth is constant."""
    cameras = torch.eye(4)[:3].repeat(1, 2, 1, 1)
    cameras[0, 1, :, :3] = torch.from_numpy(Rotation.from_euler("y", degrees, degrees=True).as_matrix())
    cameras[0, 1, 1, 3] = 1.0
    intrinsics = torch.tensor([[1e9, 0, 14], [0, 1e9, 14], [0, 0, 1]]).expand(1, 2, 3, 3)  # parallel rays
    return ViewBatch(torch.rand(1, 2, 3, 28, 28), torch.full((1, 2, 28, 28), metres), intrinsics, cameras)


def test_the_baseline_has_the_errors_of_constants() -> None:
    """All pixels of the reference are 2 m away. With all cameras at one place, a unit of length is their distance."""
    reference = wall(0)
    reference.world_to_camera[..., 3] = 0
    same = baseline([reference], reference)
    assert (same.depth, same.points, same.rotation, same.translation) == pytest.approx((0, 0, 0, 0), abs=1e-5)
    turned = baseline([wall(40)], reference)
    assert turned.rotation == pytest.approx(40, abs=1e-3)
    scale = (2 + math.hypot(2, 1)) / 2  # the first camera's points are 2 m away, those of the second sqrt(5)
    assert turned.translation == pytest.approx(1 / scale, rel=1e-4)
    assert turned.depth == pytest.approx(scale / 2 - 1, rel=1e-4)


def test_a_model_that_predicts_the_truth_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from w2r2_ds.demo.pretraining.vggt import errors
    from w2r2_ds.models.vggt.losses import make_targets

    batch = wall(40)
    truth = make_targets(batch.depth, batch.intrinsics, batch.world_to_camera)
    ones = torch.ones_like(truth.depth)
    outputs = HeadOutputs(truth.pose_encoding[None], truth.depth, ones, truth.points, ones)
    monkeypatch.setattr(errors, "run_heads", lambda vggt, images: outputs)
    model = VGGT(VGGTConfig(embed_dim=8, depth=1, num_heads=1, patch_embed="conv", vit_num_heads=1))
    found = evaluate(model, [batch])
    assert (found.depth, found.points, found.translation) == pytest.approx((0, 0, 0), abs=1e-6)
    assert found.rotation < 0.1  # arccos of a float32 matrix near the identity
    halved = HeadOutputs(truth.pose_encoding[None], truth.depth / 2, ones, truth.points, ones)
    monkeypatch.setattr(errors, "run_heads", lambda vggt, images: halved)
    assert evaluate(model, [batch]).depth == pytest.approx(0.5)
