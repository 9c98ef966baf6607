"""Geometry of the paired room, with stand-ins of a model that recognize the room by its points, or by its pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.images import Placement, frame_size
from w2r2_ds.data.prepare.pipeline import prepare
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.data.processor import Features
from w2r2_ds.data.tasks.base import TaskOptions
from w2r2_ds.data.visual_inputs import VisualInputs
from w2r2_ds.demo.synthetic.options import ShiftOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.diagnostics.causality.measures import measure_causality
from w2r2_ds.diagnostics.causality.paired_rooms import PairedRooms, compare_with_pairs, find_pairs
from w2r2_ds.evaluation.predictions.record import record_of
from w2r2_ds.evaluation.protocols.records import enclosing_box
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec
from w2r2_ds.types.sample import Sample

FRAMES = FrameOptions("uniform", 2)
SIZE = 28, 28
SPEC = GeometrySpec(14, 16, PointMapSpec(2, "world"))
FORMATS = {"camera": "vgllm", "world": "video3dllm"}
SHIFTS = ("room_scale", "camera")


@dataclass(frozen=True)
class Prepared:
    """Samples of val, and their pairs."""

    config: DataConfig
    folder: Path
    samples: list[Sample]

    def pairs(self, shift: str) -> PairedRooms:
        (found,) = find_pairs(self.config, [self.folder / f"val_{shift}"], self.samples)
        return found


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """Coordinates of the answers -> the prepared splits of one validation room."""
    root = tmp_path_factory.mktemp("rooms") / "data"
    write_dataset(root, 3, 1, 1, (64, 48), 2, shift=ShiftOptions(SHIFTS), workers=1)
    found = {}
    for form, name in FORMATS.items():
        folder = tmp_path_factory.mktemp(form)
        for split in ("val", *(f"val_{shift}" for shift in SHIFTS)):
            options = TaskOptions("scanrefer", split, name, FRAMES, visibility="depth")
            prepare(root, options, folder / split, quiet=True)
        samples = list(PreparedSet(folder / "val", root))[::2]
        found[form] = Prepared(DataConfig(root=str(root)), folder, samples)
    return found


def points(frames: tuple[Path, ...]) -> torch.Tensor:
    placements = [Placement(frame_size(path), SIZE) for path in frames]
    return torch.from_numpy(load_point_maps(frames, placements, SIZE, SPEC))


def with_points(sample: Sample, _: bool) -> Features:
    ids = torch.zeros(3, dtype=torch.int64)
    visual = VisualInputs(torch.zeros(1), ids, points(sample.frames))
    return Features(sample, ids, ids, 0, visual, ids.bool(), None)


def answer(sample: Sample, frame: int = 1) -> str:
    """The annotated box of a sample."""
    assert sample.target is not None
    if sample.box_format == "world":
        box = np.array(enclosing_box(sample.target.box.tolist()))
        return ",".join(map(str, [*(box[:3] - box[3:] / 2), *(box[:3] + box[3:] / 2)]))
    box = world_to_camera(sample.target.box, sample.cam_to_world[frame])
    return json.dumps({"frame": frame, "bbox_3d": box.tolist()})


def measured(prepared: Prepared, shift: str, model: Callable[[Features, Sample], str]) -> dict[str, Any]:
    """Causality of a stand-in: (features, paired sample) -> answer."""
    pairs = prepared.pairs(shift)
    condition = pairs.condition()
    assert condition.processor is not None
    processor = condition.processor(with_points, SPEC, prepared.samples)
    before, after = [], []
    for sample in prepared.samples:
        other = pairs.samples[sample.id]
        before.append(record_of(sample, model(with_points(sample, False), other)))
        after.append(record_of(sample, model(processor(sample, False), other)))
    return measure_causality(compare_with_pairs(before, after, prepared.samples, pairs.samples), 100)


def reads_points(features: Features, other: Sample) -> str:
    """The box of the room whose points are given."""
    maps = features.visual.geometry_frames
    rooms = [each for each in (features.sample, other) if np.array_equal(points(each.frames), maps, equal_nan=True)]
    assert len(rooms) == 1
    return answer(rooms[0])


def ignores_points(features: Features, other: Sample) -> str:
    return answer(features.sample)


@pytest.mark.parametrize(("form", "shift"), [("camera", "room_scale"), ("camera", "camera"), ("world", "room_scale")])
def test_the_slope_is_1_for_a_model_that_reads_the_points_and_0_for_one_that_ignores_them(
    splits: dict[str, Prepared], form: str, shift: str
) -> None:
    follows, stays = (measured(splits[form], shift, model) for model in (reads_points, ignores_points))
    assert follows["rows"] == follows["compared"] == len(splits[form].samples) > 3
    assert follows["unchanged"] == 0 and stays["unchanged"] == 1
    moved = [name for name, each in follows["numbers"].items() if each["rows"] and name != "centre"]
    assert "z" in moved and ("size_x" in moved) == (shift == "room_scale")
    for name in moved:
        assert follows["numbers"][name]["slope"]["value"] == pytest.approx(1, abs=1e-6), name
        assert stays["numbers"][name]["slope"]["value"] == 0
    assert follows["numbers"]["centre"]["follows"]["value"] == 1
    assert stays["numbers"]["centre"]["follows"]["value"] == 0


def test_a_wrong_answer_may_follow_too(splits: dict[str, Prepared]) -> None:
    """The expected change is added to the model's own answer, here one metre beside the annotated box."""

    def beside(sample: Sample) -> Sample:
        assert sample.target is not None
        box = sample.target.box + np.array([1.0, 0, 0, 0, 0, 0, 0, 0, 0])
        return replace(sample, target=replace(sample.target, box=box))

    def model(features: Features, other: Sample) -> str:
        same = np.array_equal(points(other.frames), features.visual.geometry_frames, equal_nan=True)
        return answer(beside(other if same else features.sample))

    found = measured(splits["world"], "room_scale", model)["numbers"]
    assert found["x"]["slope"]["value"] == pytest.approx(1, abs=1e-6)


def test_nothing_is_expected_to_move_in_the_world_if_only_the_cameras_moved(splits: dict[str, Prepared]) -> None:
    found = measured(splits["world"], "camera", ignores_points)
    assert found["compared"] == found["rows"] and found["numbers"]["x"]["rows"] == 0
    assert found["numbers"]["x"]["slope"]["value"] is None and found["numbers"]["x"]["slope"]["reason"]


def test_conditions_differ_and_identify_the_data(splits: dict[str, Prepared]) -> None:
    conditions = [splits["world"].pairs(shift).condition() for shift in SHIFTS]
    assert [each.name for each in conditions] == ["paired_room_scale", "paired_camera"]
    assert conditions[0].options != conditions[1].options
    assert {each.geometry for each in conditions} == {"fused"}


@pytest.mark.parametrize("problem", ["no shift", "other sample", "other frames", "same shift"])
def test_sets_that_cannot_be_paired(splits: dict[str, Prepared], tmp_path: Path, problem: str) -> None:
    one = splits["world"]
    folders, samples, named = [one.folder / "val_camera"], one.samples, "val_camera"
    if problem == "no shift":
        folders, named = [one.folder / "val"], "cues"
    if problem == "other sample":
        samples, named = [replace(samples[0], id="scene0000_00|0|a|0")], r"scene0000_00\|0\|a\|0"
    if problem == "other frames":
        frames = samples[0].frames
        samples, named = [replace(samples[0], frames=frames[::-1])], frames[0].name
    if problem == "same shift":
        folders = folders * 2
    with pytest.raises(ValueError, match=rf"--paired.*{named}"):
        find_pairs(one.config, folders, samples)
