"""Pretraining of the tiny VGGT: the recorded first losses, the initial patch embedding, and the sign of quaternions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from w2r2_ds.demo.pretraining.vggt.initialise import FIRST_ROOMS, NOISE
from w2r2_ds.demo.pretraining.vggt.room_views import VIEWS, Choice, RoomViews
from w2r2_ds.demo.pretraining.vggt.scenes import VGGTSettings
from w2r2_ds.demo.pretraining.vggt.train import VGGTTrainer, nearest_sign
from w2r2_ds.models.vggt.losses import VGGTTargets
from w2r2_ds.models.vggt.model import PIXEL_MEAN, PIXEL_STD

TOLERANCE = 1e-3
"""Relative; other instruction sets round differently, and two steps of the optimizers amplify it."""


FIRST_LOSSES = (
    {"camera": 0.39597, "depth": 0.52245, "points": 1.74777, "pairs": 0.25342, "matching": 4.93354, "heading": 1.08033},
    {"camera": 0.39847, "depth": 0.56736, "points": 1.74371, "pairs": 0.25323, "matching": 4.81524, "heading": 1.21867},
    {"camera": 0.42829, "depth": 0.64270, "points": 1.69258, "pairs": 0.27747, "matching": 5.11398, "heading": 1.07937},
)
"""Of the first steps with the default settings, on one thread with AVX-512."""


@pytest.fixture(scope="module")
def trainer() -> VGGTTrainer:
    settings = VGGTSettings()
    return VGGTTrainer(settings, RoomViews(settings.seed, "train"))


@pytest.mark.slow
def test_the_patch_embedding_starts_as_whitened_components(trainer: VGGTTrainer) -> None:
    choices = [Choice(room, tuple(range(VIEWS))) for room in range(FIRST_ROOMS)]
    embed = trainer.vggt.get_submodule("aggregator.patch_embed.patch_embed")
    with torch.no_grad():
        images = trainer.rooms.batch(choices).images.flatten(0, 1)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        tokens = embed((images - mean) / std).flatten(0, 1)
    covariance = tokens.T.cov()
    # Components are uncorrelated, and their variance is v / (v + noise).
    assert 1 - NOISE < covariance[0, 0] < 1.01
    assert (covariance - covariance.diag().diag()).abs().max() < 0.01
    assert tokens.mean(0).abs().max() < 0.01


@pytest.mark.slow
def test_a_short_run_reproduces_the_recorded_losses(trainer: VGGTTrainer) -> None:
    for number, recorded in enumerate(FIRST_LOSSES):
        assert trainer.step(number) == pytest.approx(recorded, rel=TOLERANCE)


def test_targets_have_the_nearer_of_two_equal_quaternions() -> None:
    encoding = torch.tensor([[[1.0, 2, 3, 0, 0.8, 0, 0.6, 0.5, 0.7]]])
    targets = VGGTTargets(encoding, *(torch.ones(1) for _ in range(4)))
    predicted = encoding.clone()
    assert torch.equal(nearest_sign(targets, predicted).pose_encoding, encoding)
    predicted[..., 4] = -1
    flipped = nearest_sign(targets, predicted)
    assert flipped.pose_encoding[0, 0].tolist() == pytest.approx([1, 2, 3, 0, -0.8, 0, -0.6, 0.5, 0.7])
    assert flipped == replace(targets, pose_encoding=flipped.pose_encoding)
