"""Stage 2: merger and first decoder layers alone; every visual token of an object predicts the object's box.

The language model then finds boxes in the visual tokens. Without this stage it spends most of its questions on finding
out that geometry matters. The head is dropped after the pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from w2r2_ds.demo.pretraining.muon import Muon
from w2r2_ds.demo.pretraining.pair.pair import BOX_LAYERS, Pair
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, View, draw_view, stack_views
from w2r2_ds.demo.pretraining.pair.scene_attention import run_layers
from w2r2_ds.demo.pretraining.pair.settings import HIDDEN, Settings
from w2r2_ds.demo.pretraining.pair.stages.tower import MIN_PIXELS
from w2r2_ds.demo.pretraining.schedule import set_learning_rates, warm_up_and_decay

WAVELENGTHS = (8.0, 4.0, 2.0, 1.0)
"""Wavelengths in metres of the sines and cosines of a box's corners, which the head predicts."""


class BoxHead(nn.Module):
    """Linear prediction of the sines and cosines of both corners of a box."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 3)
            self.linear = nn.Linear(HIDDEN, 6 * 2 * len(WAVELENGTHS))
        self.frequencies = torch.tensor([2 * math.pi / length for length in WAVELENGTHS])

    def loss(self, states: Tensor, corners: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error.

        Args:
            states: ``[..., hidden]`` of visual tokens.
            corners: ``[..., 6]`` lowest and highest corner of the box of each token's object, metres.
            mask: ``[...]`` 1 for tokens that show an object, else 0.
        """
        predicted = self.linear(states).unflatten(-1, (6, -1))
        phases = corners.unsqueeze(-1) * self.frequencies
        errors = (predicted - torch.cat([phases.sin(), phases.cos()], -1)).square().mean((-2, -1))
        mean: Tensor = (errors * mask).sum() / mask.sum().clamp(min=1)
        return mean


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """Boxes ``[..., 6]`` as centre and size -> lowest and highest corner."""
    half = boxes[..., 3:] / 2
    return np.concatenate([boxes[..., :3] - half, boxes[..., :3] + half], axis=-1)


def box_targets(views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Corners ``[views, visual tokens, 6]`` of the object with most pixels in each token, and the mask of `BoxHead`."""
    corners = [corners_of(view.boxes)[view.pixels.argmax(-1)].reshape(-1, 6) for view in views]
    shown = [(view.pixels.max(-1) >= MIN_PIXELS).reshape(-1) for view in views]
    return torch.from_numpy(np.stack(corners)).float(), torch.from_numpy(np.stack(shown)).float()


def prefix_positions(pair: Pair, rows: int) -> Tensor:
    """``[3, rows, prefix tokens]`` rotary positions."""
    return pair.prompts.positions[:, None].expand(3, rows, -1)


class DenseBoxTrainer:
    """Losses and optimizers of stage 2.

    Args:
        pair: the pair.
        head: the head.
        data: training rooms.
        settings: lengths, learning rates and seed.
    """

    def __init__(self, pair: Pair, head: BoxHead, data: RoomData, settings: Settings) -> None:
        self.pair, self.head, self.data, self.settings = pair, head, data, settings
        self.rng = np.random.default_rng([settings.seed, 12])
        others = [*pair.others(), *head.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(pair.matrices(early=True), settings.muon_lr),
            torch.optim.AdamW(others, settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, number: int) -> dict[str, float]:
        """Step `number`, from 0; returns the loss."""
        settings = self.settings
        factor = warm_up_and_decay(number, settings.box_steps, warm_up=50, decay=0.5)
        set_learning_rates(self.optimizers, [settings.muon_lr, settings.adamw_lr], factor)
        views = [draw_view(self.data, self.rng, demo_frame=False) for _ in range(settings.box_rooms)]
        embeddings = self.pair.prefix_embeddings(*stack_views(views), torch.ones(len(views), dtype=torch.bool))
        states = run_layers(self.pair.text, embeddings, prefix_positions(self.pair, len(views)), end=BOX_LAYERS)
        loss = self.head.loss(states[:, self.pair.prompts.visual], *box_targets(views))
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {"boxes": float(loss.detach())}
