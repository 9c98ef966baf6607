"""Settings of the tiny VGGT's pretraining, and the scenes of its steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from w2r2_ds.demo.pretraining.vggt.initialise import FIRST_ROOMS
from w2r2_ds.demo.pretraining.vggt.room_views import VIEWS, Choice

SPREAD = (0, 4, 12, 20)
"""Views of the demo's samples, relative to the first: four of six frames of a path around the room."""
NEAR = (0, 1, 2, 3)
"""Neighbouring views."""


@dataclass(frozen=True)
class VGGTSettings:
    """Data, length and learning rates.

    Attributes:
        seed: of rooms, weights and draws.
        rooms: rooms to train on.
        steps: steps of the optimizers.
        scenes: scenes of a step, of four frames each.
        dense_frames: frames of every scene for the losses of depth and points.
        camera_weight: weight of the camera loss; 1 in the paper, 5 in the public training code.
        pair_weight: weight of the auxiliary loss of relative poses of all pairs.
        matching_weight: weight of the auxiliary loss of descriptors.
        heading_weight: weight of the auxiliary loss of headings.
        muon_lr: learning rate of the matrices of transformer blocks.
        adamw_lr: learning rate of all other weights.
        decay: share of the steps at the end in which the learning rates fall to 0.
        narrow: share of the steps until the views of the other scenes may be anywhere on the path.
    """

    seed: int = 0
    rooms: int = 600
    steps: int = 3000
    scenes: int = 4
    dense_frames: int = 2
    camera_weight: float = 5.0
    pair_weight: float = 5.0
    matching_weight: float = 0.2
    heading_weight: float = 1.0
    muon_lr: float = 0.005
    adamw_lr: float = 1.5e-3
    decay: float = 0.5
    narrow: float = 0.34


def draw_scenes(settings: VGGTSettings, step: int) -> list[Choice]:
    """The scenes of one step; they depend on the settings and the step only.

    Half of the scenes have views as in the demo. The views of the others are near the first one, up to a distance that
    grows to half of the path. Every step adds a room.
    """
    random = np.random.default_rng([settings.seed, step])
    progress = step / settings.steps
    reach = min(VIEWS // 2, 2 + round(VIEWS // 2 * progress / settings.narrow))
    near = [offset for offset in range(-reach, reach + 1) if offset % VIEWS]
    scenes = []
    for _ in range(settings.scenes):
        if random.random() < 0.5:
            offsets = random.choice([-1, 1]) * np.array(SPREAD)
        else:
            offsets = np.concatenate(([0], random.choice(near, len(SPREAD) - 1, replace=False)))
        views = (int(random.integers(VIEWS)) + offsets) % VIEWS
        room = int(random.integers(min(settings.rooms, FIRST_ROOMS + step)))
        scenes.append(Choice(room, tuple(views.tolist()), bool(random.random() < 0.5)))
    return scenes


def draw_dense_frames(settings: VGGTSettings, step: int) -> list[int]:
    """Indices of the frames of a step for the losses of depth and points, the same in all its scenes."""
    random = np.random.default_rng([settings.seed, step, 1])
    return sorted(random.choice(len(SPREAD), settings.dense_frames, replace=False).tolist())
