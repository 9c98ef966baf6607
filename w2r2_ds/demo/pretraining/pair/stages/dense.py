"""Stage 2: merger and first decoder layers alone; every visual token of an object predicts its box, class and color.

The language model then finds boxes in the visual tokens. Without this stage it spends most of its questions on finding
out that geometry matters. Without the labels the two layers overwrite the colors, which no box needs. The head is
dropped after the pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from w2r2_ds.demo.pretraining.muon import Muon
from w2r2_ds.demo.pretraining.pair.pair import DENSE_LAYERS, Pair
from w2r2_ds.demo.pretraining.pair.rooms.room_set import CLASSES, COLORS
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, View, draw_view, stack_views
from w2r2_ds.demo.pretraining.pair.scene_attention import run_layers
from w2r2_ds.demo.pretraining.pair.settings import HIDDEN, Settings
from w2r2_ds.demo.pretraining.pair.stages.tower import MIN_PIXELS
from w2r2_ds.demo.pretraining.schedule import set_learning_rates, warm_up_and_decay

WAVELENGTHS = (8.0, 4.0, 2.0, 1.0)
"""Wavelengths in metres of the sines and cosines of a box's corners, which the head predicts."""


@dataclass(frozen=True)
class DenseTargets:
    """What visual tokens show.

    Attributes:
        corners: ``[rooms, tokens, 6]`` float32 lowest and highest corner of the object's box, metres.
        classes: ``[rooms, tokens]`` int64 number of its class.
        colors: ``[rooms, tokens]`` int64 number of its color.
        shown: ``[rooms, tokens]`` bool; False for tokens that show less than `MIN_PIXELS` pixels of an object.
    """

    corners: Tensor
    classes: Tensor
    colors: Tensor
    shown: Tensor


class DenseHead(nn.Module):
    """Linear prediction of the sines and cosines of both corners of a box, of the class and of the color."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 3)
            self.corners = nn.Linear(HIDDEN, 6 * 2 * len(WAVELENGTHS))
            self.classes = nn.Linear(HIDDEN, len(CLASSES))
            self.colors = nn.Linear(HIDDEN, len(COLORS))
        self.frequencies = torch.tensor([2 * math.pi / length for length in WAVELENGTHS])

    def losses(self, states: Tensor, targets: DenseTargets, with_geometry: Tensor) -> dict[str, Tensor]:
        """Mean losses of the tokens that show an object.

        Args:
            states: ``[rooms, tokens, hidden]`` of visual tokens.
            targets: what the tokens show.
            with_geometry: ``[rooms]`` bool; rooms in 2D only have no loss of boxes.

        Returns:
            ``boxes``: squared error; ``labels``: cross-entropy of the class plus that of the color.
        """
        predicted = self.corners(states).unflatten(-1, (6, -1))
        phases = targets.corners.unsqueeze(-1) * self.frequencies
        errors = (predicted - torch.cat([phases.sin(), phases.cos()], -1)).square().mean((-2, -1))
        shown = targets.shown
        labels = cross_entropy(self.classes(states)[shown], targets.classes[shown])
        labels = labels + cross_entropy(self.colors(states)[shown], targets.colors[shown])
        return {"boxes": _mean(errors, shown & with_geometry[:, None]), "labels": labels}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the values that are chosen; 0 if none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """Boxes ``[..., 6]`` as centre and size -> lowest and highest corner."""
    half = boxes[..., 3:] / 2
    return np.concatenate([boxes[..., :3] - half, boxes[..., :3] + half], axis=-1)


def dense_targets(data: RoomData, views: Sequence[View]) -> DenseTargets:
    """What every visual token of the views shows: the object with most of its pixels."""
    owners = np.stack([view.pixels.argmax(-1).reshape(-1) for view in views])
    rooms = np.array([[view.room] for view in views])
    corners = [corners_of(view.boxes)[own] for view, own in zip(views, owners, strict=True)]
    shown = [(view.pixels.max(-1) >= MIN_PIXELS).reshape(-1) for view in views]
    return DenseTargets(
        corners=torch.from_numpy(np.stack(corners)).float(),
        classes=torch.from_numpy(data.rooms.classes[rooms, owners]).long(),
        colors=torch.from_numpy(data.rooms.colors[rooms, owners]).long(),
        shown=torch.from_numpy(np.stack(shown)),
    )


def prefix_positions(pair: Pair, rows: int) -> Tensor:
    """``[3, rows, prefix tokens]`` rotary positions."""
    return pair.prompts.positions[:, None].expand(3, rows, -1)


class DenseTrainer:
    """Losses and optimizers of stage 2.

    Args:
        pair: the pair.
        head: the head.
        data: training rooms.
        settings: lengths, learning rates and seed.
    """

    def __init__(self, pair: Pair, head: DenseHead, data: RoomData, settings: Settings) -> None:
        self.pair, self.head, self.data, self.settings = pair, head, data, settings
        self.rng = np.random.default_rng([settings.seed, 12])
        others = [*pair.others(), *head.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(pair.matrices(early=True), settings.muon_lr),
            torch.optim.AdamW(others, settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns the losses."""
        settings = self.settings
        factor = warm_up_and_decay(number, settings.dense_steps, warm_up=50, decay=0.5)
        set_learning_rates(self.optimizers, [settings.muon_lr, settings.adamw_lr], factor)
        views = [draw_view(self.data, self.rng, demo_frame=False) for _ in range(settings.dense_rooms)]
        with_geometry = torch.ones(len(views), dtype=torch.bool)
        embeddings = self.pair.prefix_embeddings(*stack_views(views), with_geometry)
        states = run_layers(self.pair.text, embeddings, prefix_positions(self.pair, len(views)), end=DENSE_LAYERS)
        losses = self.head.losses(states[:, self.pair.prompts.visual], dense_targets(self.data, views), with_geometry)
        (losses["boxes"] + settings.label_weight * losses["labels"]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {name: float(loss.detach()) for name, loss in losses.items()}
