"""Auxiliary losses of the tiny VGGT on inputs whose loss is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from w2r2_ds.demo.pretraining.vggt.auxiliary import TEMPERATURE, heading_loss, matching_loss, pair_loss
from w2r2_ds.demo.pretraining.vggt.room_views import ViewBatch

PLACES = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0]], dtype=torch.float64)


def test_matching_of_equal_descriptors_has_the_loss_of_the_softmax() -> None:
    """Places are metres apart, so that each patch has one partner; unit vectors have similarity 1 or 0."""
    axes = torch.eye(3, dtype=torch.float64)
    descriptors = axes.expand(1, 2, 3, 3)
    logit = math.exp(1 / TEMPERATURE)
    expected = -math.log(logit / (logit + 2))
    assert float(matching_loss(descriptors, PLACES.expand(1, 2, 3, 3))) == pytest.approx(expected, rel=1e-9)
    exchanged = torch.stack((axes, axes.roll(1, 0)))[None]
    assert float(matching_loss(exchanged, PLACES.expand(1, 2, 3, 3))) == pytest.approx(10, rel=1e-3)


def test_places_that_no_other_frame_shows_are_not_matched() -> None:
    descriptors = torch.eye(3, dtype=torch.float64).repeat(1, 2, 1, 1).requires_grad_()
    places = torch.stack((PLACES, PLACES + torch.tensor([0.0, 0, 9])))[None]
    loss = matching_loss(descriptors, places)
    loss.backward()
    assert float(loss.detach()) == 0 and descriptors.grad is not None and not descriptors.grad.any()


def test_headings_that_differ_by_a_quarter_turn_are_equal() -> None:
    angles = torch.tensor([0.3, 0.3 + math.pi / 2, 0.3 - math.pi])
    forward = torch.stack((0.9 * angles.cos(), 0.9 * angles.sin(), torch.full((3,), -0.4)), dim=-1)
    predicted = torch.tensor([math.sin(1.2), math.cos(1.2), -1.6]).expand(3, 3)
    assert float(heading_loss(predicted, forward)) == pytest.approx(0, abs=1e-10)
    assert float(heading_loss(predicted + 1, forward)) == pytest.approx(1)


def test_the_loss_of_pairs_is_zero_at_the_true_relative_poses() -> None:
    """For both signs of a quaternion, and lengths in units of the scale."""
    rotation = Rotation.random(3, random_state=0)
    translation = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    matrices = torch.from_numpy(rotation.as_matrix()).float()
    cameras = torch.cat((matrices, translation[..., None]), dim=-1)[None]
    images, depth = torch.zeros(1, 3, 3, 28, 28), torch.ones(1, 3, 28, 28)
    batch = ViewBatch(images, depth, torch.eye(3).expand(1, 3, 3, 3), cameras)
    poses = torch.zeros(1, 3, 3, 7)
    for i in range(3):
        for j in range(3):
            # x_j = R_j R_i^T (x_i - t_i) + t_j
            relative = rotation[j] * rotation[i].inv()
            moved = translation[j] - torch.from_numpy(relative.as_matrix()).float() @ translation[i]
            sign = (-1) ** (i + j)
            poses[0, i, j] = torch.cat((moved / 2, sign * torch.from_numpy(relative.as_quat()).float()))
    assert float(pair_loss(poses, batch, torch.tensor([2.0]))) < 1e-10
    assert float(pair_loss(poses.transpose(1, 2), batch, torch.tensor([2.0]))) > 0.1
