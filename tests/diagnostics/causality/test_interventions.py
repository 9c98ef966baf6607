"""Interventions on point maps, with stand-ins of a model that read the box off its points, or ignore them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hand_records import in_world
from w2r2_ds.boxes3d.transforms import corners, matrix_to_euler_angles, world_to_camera
from w2r2_ds.data.processor import Features
from w2r2_ds.data.visual_inputs import VisualInputs
from w2r2_ds.diagnostics.causality.interventions import (
    INTERVENTIONS,
    ChangedPointMaps,
    Intervention,
    compare_answers,
    not_applicable,
)
from w2r2_ds.diagnostics.causality.measures import measure_causality
from w2r2_ds.diagnostics.causality.results import CausalityAnswers, causality_results
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import enclosing_box
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec
from w2r2_ds.types.sample import Sample, Target

FRAMES = 2
KINDS = ("scale", "shift", "turn")
OF_KIND = {kind: [each for each in INTERVENTIONS if each.kind == kind] for kind in KINDS}


def geometry(reference_frame: str) -> GeometrySpec:
    return GeometrySpec(14, 16, PointMapSpec(2, reference_frame))


def camera(rng: np.random.Generator) -> np.ndarray:
    """``[4, 4]`` pose of a camera that looks a little downwards, somewhere in a room."""
    yaw, pitch = rng.uniform(-3, 3), rng.uniform(0.1, 0.4)
    level = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn @ level @ tilt, rng.uniform(-2, 2, 3)
    return pose


def make_rooms(box_format: str) -> list[Sample]:
    """A sample in each of eight rooms, with random cameras and a random box."""
    rng, rooms = np.random.default_rng(1), []
    for number in range(8):
        box = np.concatenate([rng.uniform(-3, 3, 3), rng.uniform(0.4, 1.5, 3), np.zeros(3)])
        sample = Sample(
            id=f"sample{number}",
            task="scanrefer",
            scene_id=f"scene{number:04d}_00",
            frames=(),
            cam_to_world=np.stack([camera(rng) for _ in range(FRAMES)]),
            question="Where?",
            answer="",
            target=Target(box, 1, "chair", "unique"),
        )
        rooms.append(sample if box_format == "camera" else replace(in_world(sample), what=(0, 0)))
    return rooms


def with_points(sample: Sample, reference_frame: str) -> Features:
    """Features whose point map has the corners of the box, ``[frames, 2, 1, 4, 3]``."""
    assert sample.target is not None
    seen = corners(sample.target.box)
    if reference_frame == "camera":
        points = [(seen - pose[:3, 3]) @ pose[:3, :3] for pose in sample.cam_to_world]
    else:
        points = [seen] * FRAMES
    maps = torch.from_numpy(np.stack(points)).view(FRAMES, 2, 1, 4, 3)
    ids = torch.zeros(3, dtype=torch.int64)
    gray = torch.full((FRAMES, 3, 28, 14), 7, dtype=torch.uint8)
    return Features(sample, ids, ids, 0, VisualInputs(gray, ids, maps), ids.bool(), None)


def reads_points(features: Features) -> str:
    """The answer of a model that reads the box off the points of the second frame."""
    maps = features.visual.geometry_frames
    assert maps is not None
    seen = maps[1].reshape(8, 3).numpy()
    edges = np.stack([seen[4] - seen[0], seen[3] - seen[0], seen[1] - seen[0]], axis=1)  # columns: the axes of the box
    size = np.linalg.norm(edges, axis=0)
    box = np.concatenate([seen.mean(axis=0), size, matrix_to_euler_angles(edges / size)])
    if features.sample.box_format == "world":
        centre_size = np.array(enclosing_box(box.tolist()))
        low, high = centre_size[:3] - centre_size[3:] / 2, centre_size[:3] + centre_size[3:] / 2
        return ",".join(map(str, [*low, *high]))
    return json.dumps({"frame": 1, "bbox_3d": box.tolist()})


def ignores_points(features: Features) -> str:
    """The answer of a model that recognizes the room by its pixels."""
    return reads_points(with_points(features.sample, "camera" if features.sample.box_format == "camera" else "world"))


def answered(
    model: Callable[[Features], str], box_format: str, kind: str
) -> tuple[list[dict[str, Any]], dict[Intervention, list[dict[str, Any]]]]:
    """Records of a stand-in before and after the interventions of a kind."""
    samples = make_rooms(box_format)
    before = [record_of(sample, model(with_points(sample, box_format))) for sample in samples]
    after = {}
    for intervention in OF_KIND[kind]:
        changed = ChangedPointMaps(
            lambda sample, _: with_points(sample, box_format), geometry(box_format), intervention
        )
        after[intervention] = [record_of(sample, model(changed(sample, False))) for sample in samples]
    return before, after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box_format", ["camera", "world"])
def test_a_model_that_reads_the_points_has_slope_1(box_format: str, kind: str) -> None:
    answers = compare_answers(*answered(reads_points, box_format, kind))
    measures = measure_causality(answers, 100)
    assert measures["rows"] == measures["compared"] == 8 * len(OF_KIND[kind])
    np.testing.assert_allclose(answers.after[:, :6], answers.expected[:, :6], atol=1e-9)
    moved = {name: each for name, each in measures["numbers"].items() if each["rows"]}
    assert {"x", "centre"} <= moved.keys()
    for name, each in moved.items():
        assert each["follows"]["value"] == 1, name
        if name != "centre":
            assert each["slope"]["value"] == pytest.approx(1, abs=1e-9), name
    if kind != "turn":  # the box around a turned one grows; in a camera it keeps its size
        assert ("size_x" in moved) == (kind == "scale")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box_format", ["camera", "world"])
def test_a_model_that_ignores_the_points_has_slope_0(box_format: str, kind: str) -> None:
    measures = measure_causality(compare_answers(*answered(ignores_points, box_format, kind)), 100)
    assert measures["unchanged"] == 1
    for name, each in measures["numbers"].items():
        if each["rows"]:
            assert each["follows"]["value"] == 0 and (name == "centre" or each["slope"]["value"] == 0)


def test_changes_are_counted_by_the_decimals_of_the_set() -> None:
    """A scale by 0.85 changes sizes of 0.4 to 0.6 m by less than 0.1 m."""
    before, after = answered(ignores_points, "world", "scale")
    counted = []
    for decimals in (1, 2):
        samples = [replace(sample, decimals=decimals) for sample in make_rooms("world")]
        found = causality_results({"fused": before}, CausalityAnswers(after, {}, {}, {}), samples, 100, 0)
        counted.append(found["interventions"]["scale"]["numbers"]["size_x"]["rows"])
    assert 0 < counted[0] < counted[1] == len(samples) * len(after)


def test_only_the_geometry_changes() -> None:
    (sample, *_) = make_rooms("camera")
    plain = with_points(sample, "camera")
    changed = ChangedPointMaps(lambda *_: plain, geometry("camera"), Intervention("scale", 0.7))(sample, False)
    assert changed.visual.tower_frames is plain.visual.tower_frames and changed.input_ids is plain.input_ids
    torch.testing.assert_close(changed.visual.geometry_frames, 0.7 * plain.visual.geometry_frames)
    none = replace(plain, visual=replace(plain.visual, geometry_frames=None))
    assert ChangedPointMaps(lambda *_: none, geometry("camera"), Intervention("scale", 0.7))(sample, False) is none


def test_a_shift_moves_the_box_in_the_room() -> None:
    """Half a metre along x and y of the world, for an answer in any camera."""
    sample = make_rooms("camera")[0]
    assert sample.target is not None
    intervention = Intervention("shift", 0.5)
    changed = ChangedPointMaps(lambda *_: with_points(sample, "camera"), geometry("camera"), intervention)(
        sample, False
    )
    moved = sample.target.box + np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0])
    expected = world_to_camera(moved, sample.cam_to_world[1])
    np.testing.assert_allclose(json.loads(reads_points(changed))["bbox_3d"][:6], expected[:6], atol=1e-9)


def test_answers_in_another_frame_or_without_box_are_not_compared() -> None:
    before, after = answered(reads_points, "camera", "scale")
    (first, *others) = after
    for each in others:
        del after[each]
    after[first][0]["text"] = "no box"
    after[first][1]["text"] = after[first][1]["text"].replace('"frame": 1', '"frame": 0')
    before[2]["text"] = None
    measures = measure_causality(compare_answers(before, after), 100)
    assert (measures["rows"], measures["compared"]) == (8, 5)


def test_conditions_have_names_and_options_of_their_own() -> None:
    conditions = [each.condition() for each in INTERVENTIONS]
    assert len({each.name for each in conditions}) == len(INTERVENTIONS)
    assert len({json.dumps(each.options) for each in conditions}) == len(INTERVENTIONS)
    assert {each.geometry for each in conditions} == {"fused"}


@pytest.mark.parametrize(
    ("kind", "spec", "box_format", "possible"),
    [
        ("scale", geometry("world"), "camera", True),
        ("scale", geometry("first"), "camera", True),
        ("shift", geometry("camera"), "camera", True),
        ("turn", geometry("world"), "world", True),
        ("shift", geometry("world"), "camera", False),
        ("turn", geometry("camera"), "world", False),
        ("shift", geometry("first"), "camera", False),
        ("scale", geometry("camera"), None, False),
        ("scale", GeometrySpec(14, 16), "camera", False),
    ],
)
def test_what_can_be_measured(kind: Any, spec: GeometrySpec, box_format: str | None, possible: bool) -> None:
    assert (not_applicable(kind, spec, box_format) == "") == possible
