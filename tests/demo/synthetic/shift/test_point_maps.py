"""Shifts that keep the pixels are changes of the point maps, with the cameras moved along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shift_fixtures import SHIFTED, cues_of, scene_pairs
from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.images import Placement, frame_size
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.models.geometry.point_transforms import Similarity, change_point_maps, world_change
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec

ROUNDING = 2e-3
"""Depths are rounded to millimetres, at an angle of up to 40 degrees to the camera's axis."""


def point_maps(scene: Scene, reference_frame: str) -> torch.Tensor:
    """Point maps of all frames, at the patches of a frame of 84 x 56 pixels."""
    frames = [frame.color for frame in scene.frames]
    placements = [Placement(frame_size(path), (84, 56)) for path in frames]
    spec = GeometrySpec(14, 184, PointMapSpec(2, reference_frame))
    return torch.from_numpy(load_point_maps(frames, placements, (84, 56), spec))


@pytest.mark.parametrize("reference_frame", ["world", "camera", "first"])
@pytest.mark.parametrize(
    ("data", "shift", "change"),
    [
        ("shifted", "room_scale", world_change(scale=SHIFTED.shift.room_factor)),
        ("planted", "position_prior", world_change(turn=np.pi)),
    ],
)
def test_points_follow_the_shift(
    request: pytest.FixtureRequest, data: str, shift: str, change: Similarity, reference_frame: str
) -> None:
    root: Path = request.getfixturevalue(data)
    pairs = scene_pairs(root, cues_of(root, shift))
    assert pairs
    for own, other in pairs.values():
        points, expected = point_maps(own, reference_frame), point_maps(other, reference_frame)
        poses = np.stack([frame.cam_to_world for frame in own.frames])
        found = change_point_maps(points, change, poses, reference_frame, cameras_move=True)
        assert torch.isfinite(expected).all() and (found - expected).abs().max() <= ROUNDING
        if shift == "room_scale" or reference_frame == "world":
            assert (points - expected).abs().max() > 0.5
