"""Property tests: a box formatted as an answer and parsed again is the same box, up to rounding."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from w2r2_ds.boxes3d.transforms import (
    GIMBAL_TOLERANCE,
    camera_to_world,
    corners,
    euler_angles_to_matrix,
    world_to_camera,
)
from w2r2_ds.data.tasks import detection
from w2r2_ds.data.tasks.parsing import parse_grounding, parse_objects, parse_world_box
from w2r2_ds.data.tasks.scanrefer import answer_text, world_answer_text
from w2r2_ds.types.sample import LabeledBox

HALF_UNIT = 0.005 + 1e-9
"""Rounding error of a number with two decimals, in metres or radians."""

metres = st.floats(-20.0, 20.0, allow_nan=False)
sides = st.floats(0.001, 10.0)
angles = st.floats(-np.pi, np.pi)
quarters = st.sampled_from([0.0, np.pi / 2, -np.pi / 2, np.pi, 1.0, -2.5])
"""Angles at which upright boxes in level cameras have gimbal lock."""


def numbers(each: st.SearchStrategy[float], count: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(each, min_size=count, max_size=count).map(np.array)


boxes = st.builds(
    lambda centre, size, turn: np.concatenate([centre, size, turn]),
    numbers(metres, 3),
    numbers(sides, 3),
    numbers(angles, 3) | numbers(quarters, 3) | st.just(np.zeros(3)),
)


def pose(turn: np.ndarray, place: np.ndarray) -> np.ndarray:
    """A rigid transform from any three Euler angles, computed by SciPy, not by the code under test."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix()
    matrix[:3, 3] = place
    return matrix


cameras = st.builds(pose, numbers(angles, 3) | numbers(quarters, 3), numbers(metres, 3))


def thickened(box: np.ndarray) -> np.ndarray:
    """The box with sides of at least one unit of two decimals; a zero-size box is invalid."""
    return np.concatenate([box[:3], np.maximum(box[3:6], 0.01), box[6:]])


def angle_between(one: np.ndarray, other: np.ndarray) -> float:
    """Angle in radians between two rotations; computed from the chord, which is exact for small angles."""
    return float(2 * np.arcsin(min(1.0, np.linalg.norm(one - other) / np.sqrt(8))))


@given(boxes, cameras)
@settings(max_examples=300)
def test_world_to_camera_round_trip(box: np.ndarray, camera: np.ndarray) -> None:
    back = camera_to_world(world_to_camera(box, camera), camera)
    # Corners, not angles: at gimbal lock several triples are the same rotation. There, and only there, up to
    # GIMBAL_TOLERANCE radians are lost, at a corner that is at most 8.7 m from the centre.
    np.testing.assert_allclose(corners(back), corners(box), rtol=0, atol=9 * GIMBAL_TOLERANCE)


@given(boxes, cameras, st.integers(0, 31))
@settings(max_examples=300)
def test_grounding_answer_round_trip_within_rounding(box: np.ndarray, camera: np.ndarray, frame: int) -> None:
    local = world_to_camera(box, camera)
    read = parse_grounding(answer_text(frame, local), 32)
    assert read.frame == frame
    assert np.abs(read.box[:6] - thickened(local)[:6]).max() <= HALF_UNIT
    # A rotation is off by at most the sum of what its three angles are off by, at gimbal lock too.
    assert (
        angle_between(euler_angles_to_matrix(read.box[6:]), euler_angles_to_matrix(local[6:]))
        <= 3 * HALF_UNIT + GIMBAL_TOLERANCE
    )
    world = camera_to_world(read.box, camera)
    assert np.linalg.norm(world[:3] - box[:3]) <= np.sqrt(3) * HALF_UNIT
    assert np.abs(world[3:6] - thickened(box)[3:6]).max() <= HALF_UNIT


@given(boxes, st.integers(0, 99))
@settings(max_examples=200)
def test_writing_a_parsed_answer_changes_nothing(box: np.ndarray, frame: int) -> None:
    text = answer_text(frame, box)
    read = parse_grounding(text, 100)
    assert answer_text(read.frame, read.box) == text


@given(boxes)
@settings(max_examples=200)
def test_world_answer_round_trip_within_rounding(box: np.ndarray) -> None:
    read = parse_world_box(world_answer_text(box))
    # The lower end is off by half a unit; the upper one by a whole one more where it was moved away from the lower.
    assert np.abs((read[:3] - read[3:] / 2) - (box[:3] - box[3:6] / 2)).max() <= HALF_UNIT
    assert np.abs((read[:3] + read[3:] / 2) - (box[:3] + box[3:6] / 2)).max() <= 3 * HALF_UNIT
    assert (read[3:] > 0).all()


@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), boxes), max_size=4))
@settings(max_examples=200)
def test_detection_answer_round_trip_within_rounding(objects: list[tuple[str, np.ndarray]]) -> None:
    read = parse_objects(detection.answer_text([LabeledBox(label, box) for label, box in objects]))
    assert [label for label, _ in read] == [label for label, _ in objects]
    for (_, mine), (_, box) in zip(read, objects, strict=True):
        assert np.abs(mine - thickened(box)).max() <= HALF_UNIT
