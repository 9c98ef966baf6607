"""Cue boxes: they differ from the truth by the stated amount, and their pixels are those of the true box."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shift_fixtures import PLANTED, SHIFTED, cues_of, frame_poses, scene_pairs
from w2r2_ds.boxes3d.transforms import corners, world_to_camera
from w2r2_ds.data.frames.projection import project
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.data.sources.shortcut_cues import ShortcutCue
from w2r2_ds.demo.synthetic.options import SHIFTS, ShiftOptions, scene_seed
from w2r2_ds.demo.synthetic.rooms import Room, make_room
from w2r2_ds.demo.synthetic.shift.cues import assumed_box, object_cue
from w2r2_ds.demo.synthetic.shift.variants import room_layout, unshifted
from w2r2_ds.demo.synthetic.shift.variants import shifted as shifted_room

SIZES = slice(3, 6)


def pixels(points: np.ndarray, pose: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Pixels ``[n, 2]`` of world points that are at least 0.2 m in front of the camera."""
    found, depth = project(np.atleast_2d(points), pose, intrinsic)
    return found[depth > 0.2]


@functools.cache
def frames(root: Path, shift: str) -> list[tuple[ShortcutCue, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(cue, frame, camera cue, world cue, pose in val, pose in the shifted scene) of all cues."""
    cues = cues_of(root, shift)
    pairs = {name: [frame_poses(scene) for scene in scenes] for name, scenes in scene_pairs(root, cues).items()}
    rows = []
    for cue in cues:
        used, poses = pairs[cue.scene_id]
        for each in cue.frames:
            rows.append(
                (cue, each.frame, np.array(each.camera), np.array(each.world), used[each.frame], poses[each.frame])
            )
    assert len(rows) > 20
    return rows


@functools.cache
def intrinsics(root: Path) -> np.ndarray:
    return load_scene(root, "scene5000_00").intrinsic


@pytest.mark.parametrize("shift", ["furniture_scale", "room_scale"])
def test_scaled_boxes_have_the_pixels_of_the_true_box(shift: str, shifted: Path) -> None:
    """The box is scaled about the camera, so every corner has the same pixel, to the rounding of the file."""
    for cue, _, camera, _, _, pose in frames(shifted, shift):
        seen = pixels(corners(camera), pose, intrinsics(shifted))
        true = pixels(corners(np.array(cue.truth)), pose, intrinsics(shifted))
        if len(seen) == len(true):  # else a corner is near the camera
            np.testing.assert_allclose(seen, true, atol=2e-2)
        factor = cue.parameters["factor" if shift == "furniture_scale" else "room_factor"]
        assert isinstance(factor, float)
        distance, cue_distance = (np.linalg.norm(box[:3] - pose[:3, 3]) for box in (np.array(cue.truth), camera))
        assert cue_distance == pytest.approx(distance / factor, abs=1e-5)
        # The cue has the size that the object has without the shift.
        np.testing.assert_allclose(camera[SIZES], np.array(cue.paired_truth)[SIZES], atol=1e-5)


def test_furniture_scale_has_one_pose_and_a_factor_per_object(shifted: Path) -> None:
    rows = frames(shifted, "furniture_scale")
    for cue, _, camera, world, used, pose in rows:
        np.testing.assert_allclose(used, pose, atol=1e-9)
        np.testing.assert_array_equal(camera, world)
        ratio = np.array(cue.truth)[SIZES] / np.array(cue.paired_truth)[SIZES]
        np.testing.assert_allclose(ratio, cue.parameters["factor"], rtol=1e-4)
    factors = np.array(list({(cue.scene_id, cue.object_id): cue.parameters["factor"] for cue, *_ in rows}.values()))
    largest = SHIFTED.shift.furniture_factor
    assert (np.abs(np.log(factors)) >= np.log(largest) / 2 - 1e-6).all()
    assert (np.abs(np.log(factors)) <= np.log(largest) + 1e-6).all()
    assert (factors > 1).any() and (factors < 1).any()


def test_room_scale_in_world_coordinates_is_the_box_of_val(shifted: Path) -> None:
    for cue, *_, world, _, _ in frames(shifted, "room_scale"):
        np.testing.assert_allclose(world, cue.paired_truth, atol=2e-6)
        np.testing.assert_allclose(np.array(cue.truth)[:6], world[:6] * SHIFTED.shift.room_factor, atol=2e-6)


def test_focal_length_has_the_pixel_of_the_centre_and_the_usual_size(shifted: Path) -> None:
    factor = SHIFTED.shift.focal_factor
    for cue, _, camera, world, used, pose in frames(shifted, "focal_length"):
        np.testing.assert_array_equal(camera, world)
        np.testing.assert_allclose(used, pose, atol=1e-9)
        truth = np.array(cue.truth)
        np.testing.assert_array_equal(truth, cue.paired_truth)
        np.testing.assert_array_equal(camera[SIZES], truth[SIZES])
        near, far = (world_to_camera(box, pose)[2] for box in (camera, truth))
        assert near == pytest.approx(far / factor, abs=1e-5)
        own = load_scene(shifted, cue.scene_id).intrinsic
        np.testing.assert_allclose(own[:2, :2], intrinsics(shifted)[:2, :2] * factor)
        np.testing.assert_allclose(
            pixels(camera[:3], pose, intrinsics(shifted)), pixels(truth[:3], pose, own), atol=1e-3
        )


def bottom(box: np.ndarray, pose: np.ndarray | None = None) -> np.ndarray:
    """The middle of the bottom of a box that is upright, or upright after a change of the camera's pose."""
    axis = np.array([0.0, 0.0, 1.0]) if pose is None else pose[:3, :3] @ [0.0, 0.0, 1.0]
    return box[:3] - axis * box[5] / 2


def test_camera_cue_stands_on_the_floor_with_the_pixel_of_the_true_bottom(shifted: Path) -> None:
    intrinsic = intrinsics(shifted)
    moved = []
    for cue, _, camera, world, used, pose in frames(shifted, "camera"):
        truth = np.array(cue.truth)
        np.testing.assert_array_equal(truth, cue.paired_truth)
        np.testing.assert_allclose(used[:3, 3] - pose[:3, 3], [0.0, 0.0, SHIFTED.shift.camera_drop], atol=1e-9)
        turn = np.degrees(np.arccos(np.clip((np.trace(used[:3, :3].T @ pose[:3, :3]) - 1) / 2, -1, 1)))
        assert turn == pytest.approx(SHIFTED.shift.camera_flatter)
        assert pose[2, 2] > used[2, 2]  # flatter: the viewing direction points down less
        # In world coordinates: upright, on the floor, of the true size, at the true pixel of the assumed camera.
        assert bottom(world)[2] == pytest.approx(0.0, abs=2e-6)
        np.testing.assert_allclose(world[SIZES], truth[SIZES], atol=2e-6)
        np.testing.assert_allclose(world[6:], 0.0, atol=2e-6)
        true = pixels(bottom(truth), pose, intrinsic)
        np.testing.assert_allclose(pixels(bottom(world), used, intrinsic), true, atol=1e-3)
        # In the camera's coordinates: the same box, seen from the assumed pose.
        np.testing.assert_allclose(world_to_camera(camera, pose)[:6], world_to_camera(world, used)[:6], atol=1e-5)
        moved.append(np.linalg.norm(world[:3] - truth[:3]))
    assert np.median(moved) > 0.2  # metres


def test_no_camera_cue_for_what_hangs_or_is_at_the_horizon() -> None:
    pose = np.eye(4)
    pose[:3, :3] = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # looks along y, level
    pose[2, 3] = 1.0
    low = pose.copy()
    low[2, 3] = 0.5
    chair = np.array([0.0, 3.0, 0.5, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0])

    def cue(box: np.ndarray, used: np.ndarray = pose) -> np.ndarray | None:
        return assumed_box("camera", SHIFTED, box, 1.0, low, used)

    found = cue(chair)
    assert found is not None
    np.testing.assert_allclose(found[:3], [0.0, 0.5, 6.0])  # twice as high, twice as far; 0.5 m below the camera
    assert cue(chair + np.array([0.0, 0.0, 1.0, *[0.0] * 6])) is None  # hangs 1 m above the floor
    assert cue(chair + np.array([0.0, 6.0, 0.0, *[0.0] * 6])) is None  # 18 m away
    up = pose.copy()
    up[:3, :3] = pose[:3, :3] @ [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
    assert cue(chair, up) is None  # above the horizon of the assumed pose


def test_position_prior_turns_the_room(planted: Path) -> None:
    half_turn = np.array([-1.0, -1.0, 1.0])
    sides = []
    for cue, _, camera, world, used, pose in frames(planted, "position_prior"):
        truth = np.array(cue.truth)
        np.testing.assert_allclose(world[:6], np.array(cue.paired_truth)[:6], atol=2e-6)
        np.testing.assert_allclose(truth[:3], world[:3] * half_turn, atol=2e-6)
        np.testing.assert_allclose(camera[:6], truth[:6], atol=2e-6)  # no cue in the camera's coordinates
        np.testing.assert_allclose(pose[:3, 3], used[:3, 3] * half_turn, atol=1e-9)
        name, color = (cue.paired_id.split("|")[2].replace("_", " "), color_of(planted, cue))
        sides.append((color, np.sign(world[0])))
        assert name not in ("window", "door")
    # Every colour has one side in the cues, also where the object of `val` is an exception.
    by_color = {color: {side for other, side in sides if other == color} for color, _ in sides}
    assert all(len(values) == 1 for values in by_color.values())
    assert {side for values in by_color.values() for side in values} == {-1.0, 1.0}


@functools.cache
def drawn_rooms(index: int) -> list[Room]:
    """The first rooms that are drawn for a validation scene of `PLANTED`; one of them was written."""
    seed = scene_seed(PLANTED.seed, "val", index)
    layout = room_layout(PLANTED)
    return [
        make_room(np.random.default_rng([*seed, attempt]), PLANTED.frames_per_scene, layout) for attempt in range(3)
    ]


def color_of(root: Path, cue: ShortcutCue) -> str:
    """Colour of the object, from the room that is generated again."""
    for room in drawn_rooms(int(cue.scene_id[5:9]) - 5000):
        o = room.objects[min(cue.object_id, len(room.objects) - 1)]
        if np.allclose(o.box, cue.paired_truth[:6], atol=1e-5):
            return o.color
    raise AssertionError("none of the rooms has the box")


def test_an_exception_of_the_prior_has_no_cue() -> None:
    """It stands, after the turn, where the prior places it: following the prior is then correct."""
    options = replace(PLANTED, shift=ShiftOptions(("position_prior",), prior_strength=0.5, prior="class"))
    rng = np.random.default_rng(0)
    room = make_room(rng, 4, room_layout(options))
    prior = room_layout(options).prior
    assert prior is not None
    turned = shifted_room("position_prior", room, options, rng)
    found = {}
    for o in room.objects:
        fields = object_cue("position_prior", options, unshifted(room, options), turned, o.object_id, {0: 1.0})
        expected = prior.side(o.name, o.color) == np.sign(o.box[0])
        assert bool(fields["frames"]) == expected
        found[o.name] = expected
    assert set(found.values()) == {True, False}
    assert not found["window"] and not found["door"]


def test_all_shifts_are_covered() -> None:
    assert set(SHIFTED.shift.names) | set(PLANTED.shift.names) == set(SHIFTS)
