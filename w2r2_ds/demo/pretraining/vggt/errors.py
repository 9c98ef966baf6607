"""Errors of a VGGT's cameras, depth and points on rooms, beside those of predictions that use no image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from w2r2_ds.demo.pretraining.vggt.room_views import ViewBatch
from w2r2_ds.models.vggt.cameras import decode_pose
from w2r2_ds.models.vggt.losses import VGGTTargets, make_targets
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.vggt.predictions import run_heads


@dataclass(frozen=True)
class VGGTErrors:
    """Medians over pixels, or over frames but the first. Lengths: see `VGGTTargets`.

    Attributes:
        depth: ``|depth - truth| / truth``.
        points: distance of a point from its true place, in the first camera's frame.
        rotation: angle between true and predicted orientation relative to the first camera, degrees.
        translation: distance between true and predicted translation of the transform from world to camera.
    """

    depth: float
    points: float
    rotation: float
    translation: float


@torch.no_grad()
def evaluate(vggt: VGGT, batches: Sequence[ViewBatch]) -> VGGTErrors:
    """Errors of the model."""
    parts = []
    for batch in batches:
        targets = make_targets(batch.depth, batch.intrinsics, batch.world_to_camera)
        outputs = run_heads(vggt, batch.images)
        parts.append(_errors(targets, outputs.depth, outputs.points, outputs.pose_encodings[-1]))
    return _medians(parts)


@torch.no_grad()
def baseline(batches: Sequence[ViewBatch], reference: ViewBatch) -> VGGTErrors:
    """Errors of constant predictions: the best constants of the `reference` views, the same for every frame.

    Depth is the median depth, points are the median point, orientation and translation of every camera are those of
    the first camera.

    Args:
        batches: views to predict.
        reference: views of training rooms.
    """
    truth = make_targets(reference.depth, reference.intrinsics, reference.world_to_camera)
    depth, point = truth.depth.median(), truth.points.flatten(0, 3).median(0).values
    first = truth.pose_encoding[0, 0]
    parts = []
    for batch in batches:
        targets = make_targets(batch.depth, batch.intrinsics, batch.world_to_camera)
        parts.append(
            _errors(
                targets,
                depth.expand_as(targets.depth),
                point.expand_as(targets.points),
                first.expand_as(targets.pose_encoding),
            )
        )
    return _medians(parts)


def _errors(targets: VGGTTargets, depth: Tensor, points: Tensor, encoding: Tensor) -> tuple[Tensor, ...]:
    """Errors of all pixels and of all frames but the first, in the order of the fields of `VGGTErrors`."""
    valid = targets.valid
    (_, predicted), (_, true) = (
        decode_pose(each[:, 1:].double(), *valid.shape[-2:]) for each in (encoding, targets.pose_encoding)
    )
    trace = (predicted[..., :3] * true[..., :3]).sum((-2, -1))
    return (
        ((depth - targets.depth).abs() / targets.depth)[valid],
        (points - targets.points).norm(dim=-1)[valid],
        ((trace - 1) / 2).clamp(-1, 1).arccos().flatten() * (180 / math.pi),
        (predicted[..., 3] - true[..., 3]).norm(dim=-1).flatten(),
    )


def _medians(parts: list[tuple[Tensor, ...]]) -> VGGTErrors:
    """Medians over all batches."""
    values = (float(torch.cat(each).median()) for each in zip(*parts, strict=True))
    return VGGTErrors(**dict(zip((field.name for field in fields(VGGTErrors)), values, strict=True)))
