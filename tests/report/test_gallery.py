"""Choice of samples, their pictures, and the 3D view."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hand_records import beside, caption, detection
from prepared_sets import write_prepared
from w2r2_ds.config.io import DEMO_RECIPE, load_config
from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.frames.box_views import frames_to_show, with_poses
from w2r2_ds.data.frames.projection import EDGES, box_corners, project, projected_edges
from w2r2_ds.data.frames.token_rays import scene_intrinsic
from w2r2_ds.data.sources.frame_files import scene_folder
from w2r2_ds.evaluation.metrics.meteor import Java
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.resumable import write_records
from w2r2_ds.report.collect import Evaluation, EvaluationGroup, read_run
from w2r2_ds.report.gallery import Answered, answered_samples, boxes_of, choose
from w2r2_ds.report.pictures import FRAMES, WIDTH, make_card
from w2r2_ds.report.room import CUT, MAX_POINTS, VOXEL, box_lines, room_figure, room_points
from w2r2_ds.types.sample import Sample


@pytest.fixture(scope="module")
def answered(finished_run: Path) -> list[Answered]:
    run = read_run(finished_run, "margin")
    return answered_samples(run.groups[0], run.config)


def test_every_sample_has_both_scores(answered: list[Answered], room_samples: list[Sample]) -> None:
    assert [each.sample.id for each in answered] == [sample.id for sample in room_samples]
    for index, each in enumerate(answered):
        assert (each.scores["fused"] > 0.7) == (index % 2 == 0)  # labels are rounded to two decimals
        assert (each.scores["zero"] > 0.7) == (index % 5 == 0)


def test_samples_of_every_kind_are_chosen_once(answered: list[Answered]) -> None:
    chosen = choose(answered, 8)
    assert len({each.sample.id for _, each in chosen}) == len(chosen) == 8
    kinds = {kind: [each for other, each in chosen if other == kind] for kind in ("helped", "best", "worst", "hurt")}
    # In turn, so two of each kind; one sample that only 2D gets right is among the worst already.
    assert [len(found) for found in kinds.values()] == [3, 2, 2, 1]
    assert all(each.scores["fused"] - each.scores["zero"] > 0.7 for each in kinds["helped"])
    assert all(each.scores["fused"] < each.scores["zero"] for each in kinds["hurt"])
    assert min(each.scores["fused"] for each in kinds["best"]) > max(each.scores["fused"] for each in kinds["worst"])


def test_no_more_samples_than_there_are(answered: list[Answered]) -> None:
    assert len(choose(answered[:3], 8)) == 3 and choose([], 8) == [] and choose(answered, 0) == []
    without_2d = [Answered(each.sample, {"fused": each.records["fused"]}, {"fused": 0.5}) for each in answered[:4]]
    assert {kind for kind, _ in choose(without_2d, 4)} == {"best", "worst"}


def evaluated(
    folder: Path, samples: Sequence[Sample], texts: Mapping[str, Sequence[str]], protocol: str
) -> list[Answered]:
    """The samples with answers of both geometries."""
    root = Path(samples[0].frames[0]).parent
    write_prepared(folder / "set", samples, root)
    evaluations = {}
    for geometry, answers in texts.items():
        records = [record_of(sample, text) for sample, text in zip(samples, answers, strict=True)]
        file = folder / f"scores-{samples[0].task}-{geometry}.json"
        write_records(folder / f"predictions-{samples[0].task}-{geometry}.jsonl", records)
        count = len(records)
        data = (str(folder / "set"),)
        evaluations[geometry] = Evaluation(
            file, samples[0].task, geometry, data, {}, "run", {protocol: {}}, count, count
        )
    group = EvaluationGroup("title", samples[0].task, data, evaluations)
    return answered_samples(group, replace(load_config(DEMO_RECIPE), data=DataConfig(root=str(root))))


def test_captions_are_ranked_by_their_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2r2_ds.evaluation.metrics.meteor.shared_java", lambda: Java("no such program"))
    samples = [caption(number, scene=f"scene000{number}_00") for number in range(4)]
    right = [sample.references[0].text for sample in samples]
    found = evaluated(
        tmp_path, samples, {"fused": [*right[:2], "Yes.", right[3]], "zero": ["No."] * 3 + right[3:]}, "scan2cap/leo"
    )
    assert {each.measure for each in found} == {"CIDEr@0.5"}
    scores = [each.scores["fused"] for each in found]
    assert min(scores[0], scores[1], scores[3]) > 1 and scores[2] == 0
    kinds = [(kind, each.sample.id) for kind, each in choose(found, 3)]
    assert {samples[0].id, samples[1].id} == {key for kind, key in kinds if kind in ("helped", "best")}
    assert ("worst", samples[2].id) in kinds


def test_detections_are_ranked_by_f1_of_the_scene(tmp_path: Path) -> None:
    """Not by the number of boxes: two right boxes are better than four of which two are right."""
    samples = [replace(detection(), id=f"scene001{index}_00|00010") for index in range(3)]
    objects = samples[0].objects
    boxes = [{"label": each.label, "box_3d": list(each.box)} for each in objects]
    elsewhere = [{"label": "chair", "box_3d": list(beside(shift))} for shift in (20.0, 30.0)]
    texts = [json.dumps(boxes), json.dumps([*boxes, *elsewhere]), json.dumps(elsewhere)]
    found = evaluated(tmp_path, samples, {"fused": texts}, "detection/f1")
    assert [each.measure for each in found] == ["F1@0.25"] * 3
    assert [each.scores["fused"] for each in found] == pytest.approx([1.0, 2 * 2 / (4 + 2), 0.0])


def test_boxes_are_those_of_target_and_answers(answered: list[Answered]) -> None:
    boxes = boxes_of(answered[0])  # both answers are right
    true = answered[0].sample.target
    assert true is not None and set(boxes) == {"true", "fused", "zero"}
    np.testing.assert_allclose(boxes["fused"][:3], true.box[:3], atol=0.05)
    assert "fused" not in boxes_of(answered[1])  # "I cannot find it."


def test_outlines_are_the_projected_edges(answered: list[Answered]) -> None:
    card = make_card("best", answered[0])
    sample = answered[0].sample
    assert card.problem == "" and 1 <= len(card.pictures) <= FRAMES
    picture = next(each for each in card.pictures if any(outline.kind == "true" for outline in each.outlines))
    index = int(picture.label.removeprefix("frame "))
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as image:
        assert image.size == (picture.width, picture.height) and picture.width == WIDTH
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    assert sample.target is not None
    edges = projected_edges(sample.target.box, sample.cam_to_world[index], intrinsic) * WIDTH / 112
    path = next(outline.path for outline in picture.outlines if outline.kind == "true")
    numbers = np.array(re.findall(r"-?\d+\.\d", path), dtype=float).reshape(-1, 2, 2)
    np.testing.assert_allclose(numbers, np.clip(edges, -10 * WIDTH, 10 * WIDTH), atol=0.051)


def test_boxes_are_drawn_without_poses_in_the_prepared_set(answered: list[Answered], report_root: Path) -> None:
    """Sets with world boxes are prepared without poses; the pictures read them."""
    poses = answered[0].sample.cam_to_world
    unposed = replace(answered[0].sample, cam_to_world=np.full_like(poses, np.nan))
    np.testing.assert_allclose(with_poses(unposed).cam_to_world, poses, atol=1e-9)
    found, expected = make_card("best", replace(answered[0], sample=unposed)), make_card("best", answered[0])
    assert found.pictures == expected.pictures and any(picture.outlines for picture in found.pictures)
    figure, _ = room_figure(report_root, unposed, {})
    assert "cameras" in {trace.name for trace in figure.data}


def test_projected_edges_of_a_turned_box_by_hand() -> None:
    """A box in front of the camera: its edges are those between the projected corners."""
    intrinsic = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    box = np.array([0.2, 0.1, 4.0, 1.0, 0.6, 0.8])
    pixels, _ = project(box_corners(box), np.eye(4), intrinsic)
    edges = projected_edges(box, np.eye(4), intrinsic)
    assert edges.shape == (12, 2, 2)
    expected = {frozenset(map(tuple, np.round(pixels[[i, j]], 6))) for i, j in EDGES}
    assert {frozenset(map(tuple, np.round(edge, 6))) for edge in edges} == expected
    quarter = np.concatenate([box[:3], box[[1, 0, 2]], [0, 0, 0]])[[0, 1, 2, 4, 3, 5, 6, 7, 8]]
    assert projected_edges(quarter, np.eye(4), intrinsic).shape == (12, 2, 2)
    turned = np.concatenate([box[:3], box[[4, 3, 5]], [np.pi / 2, 0, 0]])  # ZXY: a quarter turn about z, sides swapped
    corners = {tuple(point) for point in np.round(projected_edges(turned, np.eye(4), intrinsic), 6).reshape(-1, 2)}
    assert corners == {tuple(point) for point in np.round(pixels, 6)}


def test_edges_behind_the_camera_are_clipped() -> None:
    intrinsic = np.diag([100.0, 100.0, 1.0])
    assert projected_edges(np.array([0, 0, -3.0, 1, 1, 1]), np.eye(4), intrinsic).shape == (0, 2, 2)
    around = projected_edges(np.array([0, 0, 0.0, 1, 1, 2]), np.eye(4), intrinsic)
    assert len(around) == 8 and np.isfinite(around).all()  # four edges of the front, four that cross the near plane


def test_frames_show_the_object(answered: list[Answered]) -> None:
    sample = answered[0].sample
    assert sample.target is not None
    intrinsic = scene_intrinsic(scene_folder(sample.frames[0]))
    many = replace(sample, frames=sample.frames * 3, cam_to_world=np.concatenate([sample.cam_to_world] * 3))
    shown = frames_to_show(many, sample.target.box, intrinsic, FRAMES)
    assert shown == sorted(shown) and len(shown) == FRAMES
    seen = sample.cam_to_world[shown[0] % len(sample.frames)]
    poses = np.stack([seen] * 4)
    poses[[0, 1, 3]] = seen @ np.diag([-1.0, 1.0, -1.0, 1.0])  # turned away from the object
    away = replace(sample, frames=sample.frames[:4], cam_to_world=poses)
    assert frames_to_show(away, sample.target.box, intrinsic, FRAMES) == [2]
    assert frames_to_show(many, None, None, FRAMES) == [0, 4, 7, 11]
    assert frames_to_show(sample, None, None, FRAMES) == [0, 1, 2, 3]


def test_missing_frames_are_reported(answered: list[Answered], tmp_path: Path) -> None:
    moved = replace(answered[0], sample=replace(answered[0].sample, frames=(tmp_path / "color" / "gone.png",)))
    card = make_card("best", moved)
    assert card.pictures == () and "gone.png" in card.problem


def test_points_of_a_room_are_inside_it(answered: list[Answered], report_root: Path) -> None:
    points, colors = room_points(report_root, answered[0].sample.scene_id)
    assert points.shape == colors.shape and 500 < len(points) <= MAX_POINTS and colors.dtype == np.uint8
    assert points[:, 2].max() - points[:, 2].min() < CUT + 0.3
    size = points.max(0) - points.min(0)
    assert (size[:2] > 1.5).all() and (size[:2] < 12).all()
    # No two points in one voxel.
    assert len(np.unique(np.floor(points.astype(float) / VOXEL), axis=0)) > 0.99 * len(points)
    true = answered[0].sample.target
    assert true is not None  # the object itself was seen: points lie on it
    inside = (np.abs(points - true.box[:3]) <= true.box[3:6] / 2 + 0.05).all(axis=1)
    assert inside.sum() > 10


def test_the_3d_view_has_points_cameras_and_boxes(answered: list[Answered], report_root: Path) -> None:
    sample, boxes = answered[0].sample, boxes_of(answered[0])
    figure, problem = room_figure(report_root, sample, boxes)
    assert problem == "" and [trace.name for trace in figure.data] == [
        "room",
        "cameras",
        "true box",
        "2D + 3D",
        "2D only",
    ]
    cameras = figure.data[1]
    assert len(cameras.x) == 24 * len(sample.frames)
    centre = np.array([cameras.x[0], cameras.y[0], cameras.z[0]])
    np.testing.assert_allclose(centre, sample.cam_to_world[0][:3, 3], atol=1e-5)


def test_a_room_without_depth_has_boxes_and_a_reason(answered: list[Answered], tmp_path: Path) -> None:
    sample = answered[0].sample
    figure, problem = room_figure(tmp_path, sample, boxes_of(answered[0]))
    assert str(tmp_path) in problem and "room" not in [trace.name for trace in figure.data]


def test_lines_of_a_box() -> None:
    lines: Sequence[np.ndarray] = box_lines(np.array([1.0, 2, 3, 2, 4, 6])).reshape(12, 3, 3).tolist()
    for start, end, gap in np.array(lines):
        assert np.isnan(gap).all() and np.count_nonzero(start != end) == 1
        assert (np.abs(start - [1, 2, 3]) == [1, 2, 3]).all()
