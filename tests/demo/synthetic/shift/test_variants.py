"""Shifted rooms in memory: furniture still fits, priors are planted with their strength, options are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shift_fixtures import SHIFTED
from w2r2_ds.demo.synthetic.furniture import KINDS, PALETTE
from w2r2_ds.demo.synthetic.options import Options, ShiftOptions, scene_id
from w2r2_ds.demo.synthetic.position_prior import PositionPrior
from w2r2_ds.demo.synthetic.questions import make_questions
from w2r2_ds.demo.synthetic.relations import resolve
from w2r2_ds.demo.synthetic.rooms import HEIGHT, Layout, Room, RoomObject, make_room
from w2r2_ds.demo.synthetic.sentences import make_sentences
from w2r2_ds.demo.synthetic.shift.variants import OTHER_SIZES, shifted


def test_scaled_furniture_fits_and_stands_where_it_stood(many_rooms: list[Room]) -> None:
    grown = total = 0
    for seed, room in enumerate(many_rooms[:10]):
        variant = shifted("furniture_scale", room, SHIFTED, np.random.default_rng(seed))
        objects = variant.room.objects
        for o, old, factor in zip(objects, room.objects, variant.factors, strict=True):
            low, high = o.box[:3] - o.box[3:] / 2, o.box[:3] + o.box[3:] / 2
            own = variant.room.vertices[np.unique(room.faces[room.face_objects == o.object_id])]
            np.testing.assert_allclose([own.min(axis=0), own.max(axis=0)], [low, high], atol=1e-9)
            np.testing.assert_allclose(o.box[3:], old.box[3:] * factor)
            assert (np.abs([low[:2], high[:2]]) <= np.array(room.size) / 2 + 1e-9).all()
            assert high[2] < HEIGHT
            if old.box[2] - old.box[5] / 2 < 1e-6:
                assert low[2] == pytest.approx(0.0, abs=1e-9)
            if KINDS[o.name].place != "free":  # the side at the wall stays
                sides = np.abs(np.concatenate([low[:2], high[:2]]) - np.concatenate(old_sides(old.box)))
                assert sides.min() < 1e-9
            assert (np.abs(o.box[:2] - old.box[:2]) < old.box[3:5].max()).all()
            grown += factor > 1
            total += 1
        for one in objects:
            for other in objects[: one.object_id]:
                assert (np.abs(one.box[:3] - other.box[:3]) * 2 > one.box[3:] + other.box[3:]).any()
        untouched = np.unique(room.faces[room.face_objects < 0])
        np.testing.assert_array_equal(variant.room.vertices[untouched], room.vertices[untouched])
    assert 0.2 < grown / total < 0.6


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_sentences_and_questions_hold_in_the_scaled_room_too(many_rooms: list[Room], name: str) -> None:
    """Some would not: without the condition, sizes and places after scaling contradict them."""

    def questions(objects: Sequence[RoomObject], others: Sequence[Sequence[RoomObject]] = ()) -> set[tuple[Any, ...]]:
        made = make_questions(np.random.default_rng(0), objects, range(len(objects)), 300, others)
        return {(question.kind, question.answers, question.object_ids) for question in made}

    wrong_sentences, wrong_questions = 0, 0
    for seed, room in enumerate(many_rooms[:4]):
        scaled = shifted(name, room, SHIFTED, np.random.default_rng(seed)).room.objects
        for others in ((scaled,), ()):
            found = make_sentences(np.random.default_rng(0), room.objects, range(len(scaled)), 30, others)
            assert found
            holds = [resolve(scaled, s.name, s.color, s.relation, s.anchors) == s.object_id for s in found]
            assert all(holds) or not others
            wrong_sentences += not all(holds)
            extra = questions(room.objects, others) - questions(scaled)
            assert not (extra and others)
            wrong_questions += bool(extra)
    assert wrong_sentences and wrong_questions


def old_sides(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return box[:2] - box[3:5] / 2, box[:2] + box[3:5] / 2


def test_lowered_cameras_are_above_furniture() -> None:
    drop = SHIFTED.shift.camera_drop
    below = 0
    for seed in range(4):
        for layout in (Layout(camera_drop=drop), Layout()):
            room = make_room(np.random.default_rng([seed, 7]), 16, layout)
            centers = room.cameras[:, :3, 3] - (0.0, 0.0, drop)
            for o in room.objects:
                inside = (np.abs(centers - o.box[:3]) < o.box[3:] / 2).all(axis=1).any()
                assert not (inside and layout.camera_drop)
                below += bool(inside)
    assert below  # without the option, lowered cameras are inside furniture


@pytest.mark.parametrize("attribute", ["color", "class"])
def test_the_prior_is_planted_with_its_strength(attribute: Any) -> None:
    prior = PositionPrior(attribute, 0.9)
    follows, per_side = [], set()
    for seed in range(10):
        room = make_room(np.random.default_rng([seed, 5]), 6, Layout(prior=prior))
        for o in room.objects:
            side = prior.side(o.name, o.color)
            if side:
                follows.append(side * o.box[0] > 0)
                per_side.add((o.color if attribute == "color" else o.name, side))
    assert len(follows) > 150
    assert np.mean(follows) == pytest.approx(0.9, abs=0.07)  # three standard errors
    assert len({name for name, _ in per_side}) == len(per_side)  # one side per colour or class
    assert abs(sum(side for _, side in per_side)) <= 1  # as many on either side
    assert len(per_side) == (len(PALETTE) if attribute == "color" else len(KINDS) - 2)


def test_the_number_of_objects_can_be_changed() -> None:
    counts = {
        factor: np.mean([len(make_room(np.random.default_rng(i), 6, Layout(factor)).objects) for i in range(3)])
        for factor in (0.7, 1.0, 1.5)
    }
    assert counts[0.7] < 0.85 * counts[1.0] < 0.85 * counts[1.5]


def test_scenes_of_a_shift_are_further_scans_of_the_room() -> None:
    assert scene_id("val", 3) == "scene5003_00"
    assert scene_id("val_furniture_scale", 3) == "scene5003_01"
    assert scene_id("val_position_prior", 3) == "scene5003_05"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("zoom",)}, "zoom"),
        ({"names": ("camera", "camera")}, "different names"),
        ({"names": ("camera", "position_prior")}, "position_prior"),
        ({"names": ("furniture_scale",), "furniture_factor": 1.0}, "furniture_factor is 1.0"),
        ({"names": ("focal_length",), "focal_factor": 1.0}, "focal_factor is 1"),
        ({"names": ("room_scale",), "room_factor": 3.0}, "room_factor is 3.0"),
        ({"names": ("camera",), "camera_drop": 0.0, "camera_flatter": 0.0}, "camera_flatter are both 0"),
        ({"names": ("camera",), "camera_drop": 1.2}, "camera_drop is 1.2"),
        ({"names": ("position_prior",), "prior_strength": 0.4}, "prior_strength is 0.4"),
        ({"names": ("position_prior",), "prior": "size"}, "prior is 'size'"),
        ({"names": ("camera",), "room_factor": 0.5}, "room_factor is 0.5, but shift does not have room_scale"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftOptions(**options)


def test_number_of_objects_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"objects is 0\.5"):
        Options(0, 1, 1, (64, 48), 4, 0.5)
    assert replace(SHIFTED, objects=2.0).objects == 2.0
