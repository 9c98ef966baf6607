"""Geometry augmentation: points, boxes and texts change alike, pixels stay, and draws depend on the sample only."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import GeometryAugmentationConfig, GeometryConfig
from w2r2_ds.data.batching.packing import groups_by_frames
from w2r2_ds.data.frames.geometry_augmentation import (
    AugmentedDataset,
    GeometryAugmentation,
    check_augmentation,
    with_longest_numbers,
)
from w2r2_ds.data.loader import make_processor, train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.tasks.base import TASKS, Task
from w2r2_ds.data.tasks.common import frame_fields
from w2r2_ds.data.tasks.detection import answer_text as objects_text
from w2r2_ds.data.tasks.parsing import parse_objects
from w2r2_ds.data.tasks.scan2cap import question_text
from w2r2_ds.data.tasks.scanrefer import world_answer_text
from w2r2_ds.data.validate import check_sample_texts
from w2r2_ds.demo.synthetic.write import Written
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.geometry.point_transforms import world_change
from w2r2_ds.types.sample import LabeledBox, Sample, Target

ALL = GeometryAugmentationConfig(scale=[0.7, 1.4], shift=[0.5, 0.5, 0.1], turn="quarter")
CHANGE = world_change(1.3, (0.4, -0.2, 0.1), np.pi / 2)
ROUNDING = 0.005 + 1e-9
"""Half a unit of the last digit of a text, metres."""


@pytest.fixture(scope="module")
def points_frontend(frontend: Any) -> Any:
    spec = geometry_spec(GeometryConfig(name="point_map", reference_frame="world"))
    return replace(frontend, geometry=spec)


@pytest.fixture(scope="module")
def world_samples(depth_samples: list[Any]) -> list[Any]:
    """Answers in the world."""
    target = replace(depth_samples[0].target, box=np.array([1.0, -2.0, 0.5, 0.8, 0.6, 1.0, 0, 0, 0]))
    answer = world_answer_text(target.box)
    return [replace(sample, box_format="world", answer=answer, target=target) for sample in depth_samples]


def loaded(samples: list[Any], frontend: Any, config: Any, start: int = 0, steps: int = 4, micro: int = 1) -> list[Any]:
    sampler = GlobalBatchSampler(Mixture([samples], [1.0], [0]), 2, micro, 0, 1, steps, start, seed=3)
    augmentation = GeometryAugmentation(ALL, "world", seed=3)
    return list(train_loader(samples, frontend, config, sampler, augmentation=augmentation))


def contents(batches: list[Any]) -> list[tuple[Any, ...]]:
    return [
        (identity, answer, box.tolist(), frames.nan_to_num(-9).tolist())
        for batch in batches
        for identity, answer, box, frames in zip(
            batch.ids, batch.answers, batch.target_box, batch.visuals.geometry_frames, strict=True
        )
    ]


def test_points_of_an_object_lie_in_its_changed_box(rooms: Written, points_frontend: Any, data_config: Any) -> None:
    """Every object of a synthetic room, with the box that the changed text has."""
    scene = load_scene(rooms.root, "scene0000_00")
    frames, processor = frame_fields(list(scene.frames[:3])), make_processor(points_frontend, data_config())
    augmentation, shown = GeometryAugmentation(ALL, "world", 0), 0
    for number, (object_id, instance) in enumerate(scene.instances.items()):
        box = np.concatenate([instance.box, np.zeros(3)])
        target = Target(box, object_id, "chair", "unique")
        answer = world_answer_text(box)
        sample = Sample("a", "scanrefer", scene.scene_id, **frames, question="?", answer=answer, target=target)
        sample = replace(sample, box_format="world")
        plain = processor(sample, True).visual
        changed = AugmentedDataset([sample], processor, augmentation)[number, 0]
        parsed = TASKS["scanrefer"].parse(changed.sample.answer, 3, "world").box
        expected = augmentation.draw(sample, number)
        assert expected is not None and changed.sample.target is not None
        np.testing.assert_allclose(parsed, expected.apply_aligned_box(box[:6]), rtol=0, atol=2 * ROUNDING)
        np.testing.assert_allclose(changed.sample.target.box, expected.apply_box(box))
        assert plain.geometry_frames is not None and changed.visual.geometry_frames is not None
        assert torch.equal(plain.tower_frames, changed.visual.tower_frames), "the pixels stay"
        before = plain.geometry_frames.reshape(-1, 3).double().numpy()
        after = changed.visual.geometry_frames.reshape(-1, 3).double().numpy()
        # Points of a surface are on the border of its box: 2 cm for their noise, and the rounding of the text.
        inside = (np.abs(before - box[:3]) < box[3:6] / 2 + 0.02).all(-1)
        assert (np.abs(after[inside] - parsed[:3]) < parsed[3:] / 2 + 0.02 * expected.scale + 2 * ROUNDING).all()
        far = (np.abs(before - box[:3]) > box[3:6] / 2 + 0.05).any(-1)
        assert (np.abs(after[far] - parsed[:3]) > parsed[3:] / 2).any(-1).all()
        shown += inside.sum()
    assert shown > 50


def test_a_box_in_a_camera_shows_the_scale_only(samples: list[Any]) -> None:
    sample = samples[0]
    changed, task = TASKS["scanrefer"].change_world(sample, CHANGE), TASKS["scanrefer"]
    before, after = (task.parse(each.answer, 4) for each in (sample, changed))
    assert after.frame == before.frame
    np.testing.assert_allclose(after.box[:6], 1.3 * before.box[:6], rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(after.box[6:], before.box[6:])
    # The moved pose places it at the changed box in the world.
    exact = world_to_camera(changed.target.box, changed.cam_to_world[after.frame])
    np.testing.assert_allclose(after.box[:3], exact[:3], rtol=0, atol=2.3 * ROUNDING)


def test_positions_in_the_prompt_of_a_caption_change(samples: list[Any]) -> None:
    described, task = np.array([1.0, 2.0, 0.5, 0.4, 0.6, 1.0]), TASKS["scan2cap"]
    target = replace(samples[0].target, described=described)
    box = np.concatenate([described, np.zeros(3)])
    base = replace(samples[0], task="scan2cap", kind="caption", answer="A chair.", target=target)
    first = base.cam_to_world[0]
    for cam_to_world in (None, first):
        found = task.change_world(replace(base, question=question_text(box, cam_to_world)), CHANGE)
        moved = None if cam_to_world is None else CHANGE.moved_pose(first)
        assert found.question == question_text(CHANGE.apply_box(box), moved) and found.answer == "A chair."
    np.testing.assert_allclose(found.target.described, CHANGE.apply_aligned_box(described))


def test_detections_and_questions(samples: list[Any]) -> None:
    objects = (LabeledBox("chair", np.array([0.5, 1, 2, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3])),)
    sample = replace(samples[0], task="detection", kind="answer", target=None, objects=objects, answer="x")
    found = TASKS["detection"].change_world(sample, CHANGE)
    assert found.answer == objects_text(found.objects)
    expected = [0.65, 1.3, 2.6, 0.52, 0.65, 0.78, 0.1, 0.2, 0.3]
    np.testing.assert_allclose(parse_objects(found.answer)[0][1], expected, rtol=0, atol=ROUNDING)
    question = replace(samples[0], task="scanqa", kind="answer", target=None, answer="red")
    found = TASKS["scanqa"].change_world(question, CHANGE)
    assert (found.question, found.answer) == (question.question, "red")
    np.testing.assert_array_equal(found.cam_to_world[1], CHANGE.moved_pose(question.cam_to_world[1]))


@pytest.mark.parametrize("config", [ALL, replace(ALL, scale=[0.3, 0.5], shift=[0.0, 0.0, 0.0], turn="none")])
def test_no_change_has_longer_texts_than_those_checked_at_start(
    samples: list[Any], world_samples: list[Any], config: GeometryAugmentationConfig
) -> None:
    described = np.array([7.0, -7.1, 0.5, 0.4, 0.6, 1.0])
    target = replace(samples[0].target, described=described)
    caption = replace(samples[0], task="scan2cap", kind="caption", answer="A chair.", target=target)
    caption = replace(caption, question=question_text(np.concatenate([described, np.zeros(3)])))
    objects = (LabeledBox("chair", np.array([0.5, 1, 9.6, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3])),)
    detected = replace(samples[0], task="detection", kind="answer", target=None, objects=objects)
    detected = replace(detected, answer=objects_text(objects))
    augmentation, longer = GeometryAugmentation(config, "world", seed=3), 0
    for sample in (samples[0], world_samples[0], caption, detected):
        longest = with_longest_numbers(sample, config)
        for number in range(50):
            change = augmentation.draw(sample, number)
            assert change is not None
            for text in (sample, TASKS[sample.task].change_world(sample, change)):
                assert len(text.question) <= len(longest.question) and len(text.answer) <= len(longest.answer)
                longer += len(text.question + text.answer) > len(sample.question + sample.answer)
    assert longer or config is not ALL
    assert with_longest_numbers(samples[0], GeometryAugmentationConfig()) is samples[0]


def test_a_text_that_only_fits_without_changes_raises_at_start(
    world_samples: list[Any], points_frontend: Any, data_config: Any
) -> None:
    sample = world_samples[0]
    length = len(make_processor(points_frontend, data_config())(sample, True).input_ids)
    processor = make_processor(points_frontend, data_config(max_length=length))
    assert check_sample_texts([sample], processor) == 1
    with pytest.raises(ValueError, match=rf"{sample.id}.*data\.max_length = {length}"):
        check_sample_texts([sample], processor, augmentation=ALL)


def test_draws_do_not_depend_on_workers_micro_batches_or_the_first_step(
    world_samples: list[Any], points_frontend: Any, data_config: Any
) -> None:
    expected = contents(loaded(world_samples, points_frontend, data_config()))
    assert len(expected) == 8 and len({item[1] for item in expected}) == 8, "other changes in every epoch"
    for workers in (1, 2):
        assert contents(loaded(world_samples, points_frontend, data_config(workers=workers))) == expected
    assert contents(loaded(world_samples, points_frontend, data_config(), start=2)) == expected[4:]
    assert contents(loaded(world_samples, points_frontend, data_config(), micro=2)) == expected


def test_ranges_and_probability(samples: list[Any]) -> None:
    drawn = [GeometryAugmentation(ALL, "world", 0).draw(samples[0], number) for number in range(400)]
    changes = [change for change in drawn if change is not None]
    scales = np.array([change.scale for change in changes])
    assert len(changes) == 400 and 0.7 <= scales.min() < 0.72 and 1.37 < scales.max() <= 1.4
    assert abs(np.log(scales).mean() - np.log(0.7 * 1.4) / 2) < 5 * np.log(2) / np.sqrt(12 * 400)
    shifts = np.array([change.shift for change in changes])
    assert (np.abs(shifts).max(0) <= [0.5, 0.5, 0.1]).all() and (np.abs(shifts).max(0) > [0.48, 0.48, 0.096]).all()
    turns = np.array([np.rint(change.rotation[0, :2]) for change in changes])
    assert all(abs((turns == turn).all(-1).sum() - 100) < 45 for turn in ([1, 0], [0, 1], [-1, 0], [0, -1]))
    half = GeometryAugmentation(replace(ALL, probability=0.5), "world", 0)
    kept = [half.draw(samples[0], number) for number in range(400)]
    assert abs(sum(change is None for change in kept) - 200) < 50
    same = [
        (a.scale, a.shift.tolist()) == (b.scale, b.shift.tolist()) for a, b in zip(drawn, kept, strict=True) if a and b
    ]
    assert all(same), "the probability does not change the other draws"


def test_an_answer_that_cannot_be_changed_names_its_sample(
    samples: list[Any], points_frontend: Any, data_config: Any
) -> None:
    """The label's frame does not exist."""
    broken = replace(samples[0], answer=samples[0].answer.replace('"frame": ', '"frame": 9'))
    dataset = AugmentedDataset(
        [broken], make_processor(points_frontend, data_config()), GeometryAugmentation(ALL, "world", seed=3)
    )
    with pytest.raises(ValueError, match=re.escape(broken.id)):
        dataset[0, 0]


def test_questions_of_a_scene_group_share_the_change(
    world_samples: list[Any], points_frontend: Any, data_config: Any
) -> None:
    pair = [world_samples[0], replace(world_samples[0], id="other", question="Where is the lamp?", what=(0, 0))]
    dataset = AugmentedDataset(
        pair, make_processor(points_frontend, data_config()), GeometryAugmentation(ALL, "world", 0)
    )
    first, second, later = dataset[5, 0], dataset[5, 1], dataset[6, 1]
    points = [each.visual.geometry_frames.nan_to_num(-9) for each in (first, second, later)]
    assert torch.equal(points[0], points[1]) and not torch.equal(points[0], points[2])
    assert [group.members for group in groups_by_frames([first, second, later])] == [(0, 1), (2,)]
    sampler = GlobalBatchSampler(Mixture([pair], [1.0], [0]), 2, 2, 0, 1, 3, questions_per_scene=2)
    assert [[number for number, _ in batch] for batch in sampler.numbered()] == [[0, 0], [1, 1], [2, 2]]
    assert [[index for _, index in batch] for batch in sampler.numbered()] == list(sampler)


class Silent(Task):
    """A task without `change_world`."""

    name = "silent"
    annotations = read = make_samples = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("changes", "geometry", "sample", "names"),
    [
        ({}, {"name": "vggt", "path": ""}, {}, ["data.geometry_augmentation", "model.geometry.name"]),
        ({}, {"reference_frame": "camera"}, {}, ["model.geometry.reference_frame", "data.geometry_augmentation.scale"]),
        ({"turn": "any"}, {}, {}, ["data.geometry_augmentation.turn", "scanrefer"]),
        ({}, {}, {"task": "silent"}, ["Task.change_world", "silent"]),
    ],
)
def test_what_cannot_be_changed_raises_at_start(
    world_samples: list[Any],
    frontend: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    geometry: dict[str, Any],
    sample: dict[str, Any],
    names: list[str],
) -> None:
    monkeypatch.setitem(TASKS, "silent", Silent())
    given = {"name": "point_map", "reference_frame": "world", **geometry}
    spec = frontend.geometry if given["name"] == "vggt" else geometry_spec(GeometryConfig(**given))
    mixture = Mixture([[replace(world_samples[0], **sample)]], [1.0], [0])
    with pytest.raises(ValueError) as caught:
        check_augmentation(replace(ALL, **changes), spec, mixture)
    assert all(name in str(caught.value) for name in names)
    check_augmentation(GeometryAugmentationConfig(), spec, mixture)  # off by default


def test_accepted_combinations(world_samples: list[Any], samples: list[Any]) -> None:
    world = geometry_spec(GeometryConfig(name="point_map", reference_frame="world"))
    camera = geometry_spec(GeometryConfig(name="point_map", reference_frame="camera"))
    check_augmentation(ALL, world, Mixture([world_samples, []], [1.0, 1.0], [0, 0]))
    check_augmentation(replace(ALL, turn="any"), world, Mixture([samples], [1.0], [0]))
    check_augmentation(GeometryAugmentationConfig(scale=[0.7, 1.4]), camera, Mixture([samples], [1.0], [0]))


def test_axis_aligned_boxes_are_turned_by_quarters_only() -> None:
    with pytest.raises(ValueError, match="90"):
        world_change(turn=0.3).apply_aligned_box(np.ones(6))
    found = world_change(turn=-np.pi / 2).apply_aligned_box(np.array([1.0, 2, 3, 0.1, 0.2, 0.3]))
    np.testing.assert_allclose(found, [2, -1, 3, 0.2, 0.1, 0.3])


def test_options() -> None:
    found = load_config(overrides=["--data.geometry_augmentation.scale", "[0.7, 1.4]"]).data.geometry_augmentation
    assert found.scale == [0.7, 1.4] and found.enabled and not found.moves_world
    assert not load_config().data.geometry_augmentation.enabled
    for option, value in {"scale": "[1.4, 0.7]", "shift": "[1]", "probability": "0", "turn": "half"}.items():
        with pytest.raises(ValueError, match=rf"data\.geometry_augmentation\.{option}"):
            load_config(overrides=[f"--data.geometry_augmentation.{option}", value])
