"""Tokens that the projected box of a target covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from anchor_batches import FOCAL, write_intrinsic
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.diagnostics.attention.target_tokens import hull_outline, in_hull, target_coverage
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Target

AHEAD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
"""Pose of a camera at the origin that faces +y."""


@pytest.fixture
def preprocessor(frontend: Any, data_config: Any) -> VisualPreprocessor:
    """Frames of 80 x 60 pixels become 560 x 420: 20 x 15 tokens of 4 pixels of the file."""
    config = data_config(frame_width=560, decode_threads=1)
    return VisualPreprocessor(frontend.family, frontend.vision, GeometrySpec(14, 8), config)


def with_box(sample: Any, center: list[float], size: float = 1.0) -> Any:
    poses = np.tile(AHEAD, (len(sample.frames), 1, 1))
    poses[1] = np.nan
    poses[2, :3, :3] = AHEAD[:3, :3] @ np.diag([-1.0, 1.0, -1.0])  # faces away
    box = np.array([*center, size, size, size, 0, 0, 0])
    return replace(sample, cam_to_world=poses, target=Target(box, 1, "x", "unique"))


def test_coverage_of_a_cube(samples: list[Any], preprocessor: VisualPreprocessor) -> None:
    """Its front face, 2.5 m away, is what is visible of it: a square of 70 / 2.5 = 28 pixels in the middle."""
    write_intrinsic(samples[0])
    coverage = target_coverage(with_box(samples[0], [0.0, 3.0, 0.0]), preprocessor)
    by_frame = coverage.reshape(4, 15, 20)
    assert not by_frame[1].any() and not by_frame[2].any() and np.array_equal(by_frame[0], by_frame[3])
    # Pixels 25.5 to 53.5 of 80 and 15.5 to 43.5 of 60, borders included: tokens 6 to 13 and 4 to 11, in part.
    side = FOCAL / 2.5
    assert by_frame[0].sum() * 16 == pytest.approx(side**2, rel=0.1)
    assert (by_frame[0, 4:11, 7:13] == 1).all()
    outer = by_frame[0].copy()
    outer[3:12, 6:14] = 0
    assert not outer.any()


def test_targets_that_are_not_in_view(samples: list[Any], preprocessor: VisualPreprocessor) -> None:
    write_intrinsic(samples[0])
    for center in ([50.0, 3.0, 0.0], [0.0, 0.0, 0.0]):  # beside all cameras; around them
        assert not target_coverage(with_box(samples[0], center), preprocessor).any()


def test_hull() -> None:
    square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2], [1, 1]])
    points = np.array([[1.0, 0.5], [3, 1], [-0.1, 0]])
    assert in_hull(points, square).tolist() == [True, False, False]
    assert sorted(hull_outline(square).tolist()) == [[0, 0], [0, 2], [2, 0], [2, 2]]
    for flat in (square[:2], np.array([[0.0, 0], [1, 1], [2, 2]])):
        assert not in_hull(points, flat).any() and len(hull_outline(flat)) == 0
