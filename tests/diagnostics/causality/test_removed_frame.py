"""Answers without the geometry of one frame, with stand-ins of a model that ignore it, or read one frame only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from depth_scenes import DEPTH_SIZE, pinhole
from hand_records import BOX, LEVEL, beside, camera_answer, grounding
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.processor import Features
from w2r2_ds.data.visual_inputs import VisualInputs
from w2r2_ds.diagnostics.causality.removed_frame import (
    COLUMNS,
    ROWS,
    WHICH,
    RemovedFrame,
    Which,
    condition,
    movement,
    rays_on_target,
    removed_frame,
)
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.types.sample import Sample, Target

WALL = 2.0
"""Distance of the wall that every depth image measures, metres."""
AHEAD, BACK = LEVEL, LEVEL @ np.diag([-1.0, 1, -1, 1])
"""Poses of two cameras at one place, with opposite viewing directions."""
OFFSET = 3.0
"""Distance in metres by which a stand-in's answer without geometry is wrong."""
VIEWS = {"one": (BACK, AHEAD, BACK), "two": (AHEAD, BACK, AHEAD), "none": (BACK, BACK, BACK), "all": (AHEAD,) * 3}
"""Name of a room -> camera poses; cameras ahead show the target."""


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Samples of rooms with a wall before every camera; the target is a part of the wall before `AHEAD`."""
    root, samples = tmp_path_factory.mktemp("rooms"), {}
    box = camera_to_world(np.array([0, 0, WALL, 1.0, 0.75, 0.1, 0, 0, 0]), AHEAD)
    for number, (name, poses) in enumerate(VIEWS.items()):
        scene = f"scene{number:04d}_00"
        images, scan = root / "posed_images" / scene, root / "scans" / scene
        images.mkdir(parents=True)
        scan.mkdir(parents=True)
        (scan / f"{scene}.txt").write_text("axisAlignment = " + " ".join(map(str, np.eye(4).ravel())))
        for file in ("intrinsic.txt", "depth_intrinsic.txt"):
            np.savetxt(images / file, pinhole(DEPTH_SIZE))
        frames = tuple(images / f"{index:05d}.jpg" for index in range(len(poses)))
        for path, pose in zip(frames, poses, strict=True):
            Image.new("RGB", DEPTH_SIZE).save(path)
            np.savetxt(path.with_suffix(".txt"), pose)
            Image.fromarray(np.full(DEPTH_SIZE[::-1], 1000 * WALL, dtype=np.uint16)).save(path.with_suffix(".png"))
        base = grounding("0", number, scene)
        samples[name] = Sample(
            **{**vars(base), "frames": frames, "cam_to_world": np.stack(poses), "target": Target(box, 1, "a", "unique")}
        )
    return samples


def with_maps(sample: Sample, _: bool) -> Features:
    """Features whose point map of frame i has the value i."""
    ids = torch.zeros(3, dtype=torch.int64)
    maps = torch.arange(len(sample.frames)).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 4, 3).float()
    return Features(sample, ids, ids, 0, VisualInputs(torch.zeros(1), ids, maps), ids.bool(), None)


def reads_any_frame(features: Features) -> str:
    """Right while the geometry of a frame with the target is there, else `OFFSET` beside it."""
    maps = features.visual.geometry_frames
    assert maps is not None
    left = [
        count for count, points in zip(rays_on_target(features.sample), maps, strict=True) if points.isfinite().all()
    ]
    return camera_answer(features.sample, 0, beside(0.0 if any(left) else OFFSET))


def reads_all_frames(features: Features) -> str:
    """Wrong if the geometry of any frame is missing, in a camera that looks back then."""
    maps = features.visual.geometry_frames
    assert maps is not None
    complete = bool(maps.isfinite().all())
    return camera_answer(features.sample, 0 if complete else 1, beside(0.0 if complete else OFFSET))


def ignores_geometry(features: Features) -> str:
    return camera_answer(features.sample, 1, BOX)


def test_rays_on_the_target_are_counted(rooms: dict[str, Sample]) -> None:
    """The wall is 2 m x 1.5 m in the image, the target 1 m x 0.75 m, its margin is below a depth pixel."""
    quarter = COLUMNS * ROWS // 4
    assert rays_on_target(rooms["one"]) == [0, quarter, 0]
    assert rays_on_target(rooms["two"]) == [quarter, 0, quarter]
    assert rays_on_target(Sample(**{**vars(rooms["two"]), "target": None})) == [0, 0, 0]


@pytest.mark.parametrize(
    ("rays", "target", "other"),
    [([0, 0], None, None), ([3, 9, 9], 1, None), ([3, 0, 9, 0], 2, 1)],
)
def test_the_removed_frame(rays: list[int], target: int | None, other: int | None) -> None:
    assert (removed_frame(rays, "target"), removed_frame(rays, "other")) == (target, other)


def test_the_points_of_one_frame_are_removed(rooms: dict[str, Sample]) -> None:
    for which, frame in zip(WHICH, (1, 0), strict=True):
        features = with_maps(rooms["one"], False)
        changed = RemovedFrame(lambda *_, features=features: features, which)(rooms["one"], False)
        maps = changed.visual.geometry_frames
        assert maps is not None and changed.visual.tower_frames is features.visual.tower_frames
        assert [bool(points.isnan().all()) for points in maps] == [index == frame for index in range(3)]
        assert not features.visual.geometry_frames.isnan().any(), "the given features are not changed"
        kept = [index for index in range(3) if index != frame]
        assert torch.equal(maps[kept], features.visual.geometry_frames[kept])
    features = with_maps(rooms["none"], False)
    assert RemovedFrame(lambda *_: features, "target")(rooms["none"], False) is features


def moved(model: Callable[[Features], str], samples: list[Sample], which: Which) -> dict[str, object]:
    """Movement of a stand-in."""
    before = [record_of(sample, model(with_maps(sample, False))) for sample in samples]
    removed = RemovedFrame(with_maps, which)
    after = [record_of(sample, model(removed(sample, False))) for sample in samples]
    return movement(before, after, [rays_on_target(sample) for sample in samples], which, 100, 0)


def values(measures: dict[str, object], *names: str) -> list[object]:
    return [each["value"] if isinstance(each := measures[name], dict) else each for name in names]


FIELDS = ("samples", "compared", "moved", "unchanged")


@pytest.mark.parametrize("which", WHICH)
def test_a_model_without_geometry_does_not_move(rooms: dict[str, Sample], which: Which) -> None:
    found = moved(ignores_geometry, list(rooms.values()), which)
    count = 3 if which == "target" else 2
    assert values(found, *FIELDS) == [count, count, 0, 1]
    assert found["by_frames"].keys() == ({"1", "2", "3"} if which == "target" else {"1", "2"})


def test_a_model_that_reads_any_frame_moves_if_one_frame_has_the_target(rooms: dict[str, Sample]) -> None:
    found = moved(reads_any_frame, list(rooms.values()), "target")
    groups = found["by_frames"]
    assert values(groups["1"], *FIELDS) == [1, 1, pytest.approx(OFFSET, abs=1e-5), 0]
    assert values(groups["2"], *FIELDS) == values(groups["3"], *FIELDS) == [1, 1, 0, 1]
    assert values(found, "moved", "unchanged") == pytest.approx([OFFSET / 3, 2 / 3], abs=1e-5)
    assert values(moved(reads_any_frame, list(rooms.values()), "other"), *FIELDS) == [2, 2, 0, 1]


def test_movement_is_that_of_the_box_in_the_world(rooms: dict[str, Sample]) -> None:
    """Also if the answer is in another frame's camera than before."""
    for which in WHICH:
        found = moved(reads_all_frames, [rooms["one"], rooms["two"]], which)
        assert values(found, *FIELDS) == [2, 2, pytest.approx(OFFSET, abs=1e-5), 0]


def test_answers_without_box_are_not_compared(rooms: dict[str, Sample]) -> None:
    found = moved(lambda features: "no box", [rooms["two"]], "target")
    assert values(found, *FIELDS) == [1, 0, None, 1]
    assert found["moved"]["reason"]
    assert moved(ignores_geometry, [rooms["none"]], "target")["samples"] == 0


def test_conditions_differ() -> None:
    conditions = [condition(which) for which in WHICH]
    assert len({each.name for each in conditions}) == len({str(each.options) for each in conditions}) == 2
    for each in conditions:
        assert each.processor is not None and each.geometry == "fused"
