"""Pretraining of a tiny VGGT on synthetic rooms: cameras, depth and points through VGGT's heads.

The losses are those of `models/vggt/losses.py`. Targets have no metric scale: they are in the frame of the first
camera, in units of the mean distance of the scene's points from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from w2r2_ds.demo.pretraining.muon import Muon
from w2r2_ds.demo.pretraining.schedule import set_learning_rates, warm_up_and_decay
from w2r2_ds.demo.pretraining.vggt.auxiliary import Auxiliary, AuxiliaryLosses
from w2r2_ds.demo.pretraining.vggt.initialise import CONFIG, initialise
from w2r2_ds.demo.pretraining.vggt.room_views import RoomViews, ViewBatch
from w2r2_ds.demo.pretraining.vggt.scenes import VGGTSettings, draw_dense_frames, draw_scenes
from w2r2_ds.models.vggt.config import HEADS
from w2r2_ds.models.vggt.losses import VGGTLoss, VGGTTargets, make_targets, vggt_loss
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import run_heads
from w2r2_ds.models.weights.loading import without_zero3_init

WARM_UP = 50
"""Steps of the learning rates' warm-up."""
MAX_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class StepLoss:
    """Losses of one step: those of VGGT, and the auxiliary ones."""

    vggt: VGGTLoss
    auxiliary: AuxiliaryLosses

    def values(self) -> dict[str, float]:
        """All losses, without weights."""
        parts = {**vars(self.vggt), **vars(self.auxiliary)}
        return {name: float(part.detach()) for name, part in parts.items()}


class VGGTTrainer:
    """A tiny VGGT, the auxiliary heads and the optimizers.

    Muon trains the matrices of the transformer blocks, AdamW all other weights.

    Args:
        settings: settings; the same give the same weights.
        rooms: training rooms.
    """

    def __init__(self, settings: VGGTSettings, rooms: RoomViews) -> None:
        self.settings, self.rooms = settings, rooms
        with torch.random.fork_rng(devices=[]), without_zero3_init():
            torch.manual_seed(settings.seed)
            self.vggt = VGGT(CONFIG, HEADS)
            initialise(self.vggt, rooms)
            self.auxiliary = Auxiliary(self.vggt)
        matrices: list[Tensor] = []
        others: list[Tensor] = list(self.auxiliary.parameters())
        for name, parameter in self.vggt.named_parameters():
            in_block = ("blocks." in name or "trunk." in name) and parameter.dim() == 2
            (matrices if in_block else others).append(parameter)
        self.optimizers: tuple[Muon, torch.optim.AdamW] = (
            Muon(matrices, lr=settings.muon_lr),
            torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.01),
        )

    def step(self, number: int) -> dict[str, float]:
        """One step of the optimizers; returns the losses before it.

        Args:
            number: of the step, from 0; it determines the scenes.
        """
        settings = self.settings
        factor = warm_up_and_decay(number, settings.steps, WARM_UP, settings.decay)
        set_learning_rates(self.optimizers, (settings.muon_lr, settings.adamw_lr), factor)
        batch = self.rooms.batch(draw_scenes(settings, number))
        loss = step_loss(self.vggt, self.auxiliary, batch, draw_dense_frames(settings, number))
        self.total(loss).backward()
        torch.nn.utils.clip_grad_norm_(self.vggt.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.values()

    def total(self, loss: StepLoss) -> Tensor:
        """Weighted sum of all parts."""
        settings, auxiliary = self.settings, loss.auxiliary
        return (
            settings.camera_weight * loss.vggt.camera
            + loss.vggt.depth
            + loss.vggt.points
            + settings.pair_weight * auxiliary.pairs
            + settings.matching_weight * auxiliary.matching
            + settings.heading_weight * auxiliary.heading
        )


def step_loss(vggt: VGGT, auxiliary: Auxiliary, batch: ViewBatch, dense_frames: list[int]) -> StepLoss:
    """The losses of one batch, those of depth and points for `dense_frames` only."""
    targets = make_targets(batch.depth, batch.intrinsics, batch.world_to_camera)
    outputs = run_heads(vggt, batch.images, dense_frames=dense_frames)
    losses = auxiliary(batch, targets)
    targets = replace(
        nearest_sign(targets, outputs.pose_encodings[-1].detach()),
        depth=targets.depth[:, dense_frames],
        points=targets.points[:, dense_frames],
        valid=targets.valid[:, dense_frames],
    )
    return StepLoss(vggt_loss(outputs, targets), losses)


def nearest_sign(targets: VGGTTargets, predicted: Tensor) -> VGGTTargets:
    """Targets with the one of the two equal quaternions that is nearer to the prediction.

    Cameras on opposite sides of a room differ by half a turn, where the quaternion with ``w >= 0`` jumps.

    Args:
        targets: of the scenes.
        predicted: ``[B, S, 9]`` pose encodings.
    """
    encoding = targets.pose_encoding
    cosine = (encoding[..., 3:7] * predicted[..., 3:7]).sum(-1, keepdim=True)
    sign = torch.where(cosine < 0, -1.0, 1.0)
    encoding = torch.cat((encoding[..., :3], sign * encoding[..., 3:7], encoding[..., 7:]), dim=-1)
    return replace(targets, pose_encoding=encoding)
