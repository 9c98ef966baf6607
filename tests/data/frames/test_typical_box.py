"""Typical depth and size of targets, on samples made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchor_batches import write_intrinsic
from w2r2_ds.data.frames.typical_box import depths_in_view, typical_box
from w2r2_ds.types.sample import Target

AHEAD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""Pose of a camera at the origin that faces +y."""


def at(sample: Any, name: str, distance: float, size: tuple[float, float, float], kind: int, yaw: float = 0.0) -> Any:
    """The sample with its target `distance` metres ahead of the first camera; the other cameras face away."""
    poses = np.tile(AHEAD, (len(sample.frames), 1, 1))
    poses[1:, :3, :3] = AHEAD[:3, :3] @ np.diag([-1.0, 1.0, -1.0])
    box = np.array([0.0, distance, 0.0, *size, yaw, 0.0, 0.0])
    return replace(sample, id=name, cam_to_world=poses, target=Target(box, 1, "x", "unique", scannet_class=kind))


@pytest.fixture
def located(samples: list[Any]) -> list[Any]:
    write_intrinsic(samples[0])
    first = samples[0]
    return [
        at(first, "a", 2.0, (1.0, 1.0, 1.0), 4),
        at(first, "b", 3.0, (2.0, 1.0, 1.5), 4),
        at(first, "c", 5.0, (0.5, 3.0, 2.0), 6, yaw=np.pi / 2),
    ]


def test_medians_over_the_targets(located: list[Any], caption_sample: Any) -> None:
    write_intrinsic(caption_sample)
    found = typical_box([*located, caption_sample])
    assert found.depth == pytest.approx(3.0) and found.samples == 3
    # "c" is turned by a quarter: along the world's axes it is 3 x 0.5 x 2.
    np.testing.assert_allclose(found.size, [2.0, 1.0, 1.5])
    assert set(found.class_sizes) == {4, 6}
    np.testing.assert_allclose(found.class_sizes[4], [1.5, 1.0, 1.25])
    np.testing.assert_allclose(found.size_of(located[2]), [3.0, 0.5, 2.0])
    unseen = replace(located[0], target=replace(located[0].target, scannet_class=11))
    np.testing.assert_allclose(found.size_of(unseen), found.size)
    assert "3.00 m" in found.describe()


def test_a_target_behind_or_beside_the_cameras_has_no_depth(located: list[Any]) -> None:
    assert depths_in_view(np.array([0.0, 4.0, 0.0]), located[0]) == pytest.approx([4.0])
    behind = depths_in_view(np.array([0.0, -4.0, 0.0]), located[0])  # ahead of the other three cameras
    assert behind == pytest.approx([4.0] * 3)
    assert not len(depths_in_view(np.array([4.0, 1.0, 0.0]), located[0]))


def test_sets_without_a_target_in_view_are_an_error(located: list[Any], caption_sample: Any) -> None:
    beside = replace(located[0], target=replace(located[0].target, box=np.array([40.0, 1, 0, 1, 1, 1, 0, 0, 0])))
    write_intrinsic(caption_sample)
    no_poses = replace(located[0], cam_to_world=np.full_like(located[0].cam_to_world, np.nan))
    for chosen in ([], [caption_sample], [beside], [no_poses]):
        with pytest.raises(ValueError, match=r"data\.train.*shortcut_decode"):
            typical_box(chosen)


def test_every_scene_needs_intrinsics(located: list[Any], caption_sample: Any, tmp_path: Path) -> None:
    """Also those of captions, whose batches need rays too."""
    elsewhere = replace(caption_sample, frames=tuple(tmp_path / path.name for path in caption_sample.frames))
    with pytest.raises(ValueError, match=str(tmp_path)):
        typical_box([*located, elsewhere])
