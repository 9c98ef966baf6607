"""World frame `corner`: the same room and pixels, coordinates of 0 or more, and the first camera towards +y."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shift_fixtures import SHIFTED
from w2r2_ds.boxes3d.transforms import corners, world_to_camera
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.demo.synthetic.options import Options, ShiftOptions
from w2r2_ds.demo.synthetic.rooms import Room
from w2r2_ds.demo.synthetic.shift.variants import shifted
from w2r2_ds.demo.synthetic.world_frame import corner_frame, quarter_turns
from w2r2_ds.demo.synthetic.write import write_dataset


def test_the_room_covers_positive_coordinates_and_the_first_camera_heads_to_y(many_rooms: list[Room]) -> None:
    turns = set()
    for room in many_rooms:
        placed = corner_frame(room)
        turns.add(quarter_turns(room.cameras[0]))
        heading = placed.cameras[0, :2, 2]
        assert heading[1] >= abs(heading[0])  # within 45 degrees of +y
        assert quarter_turns(placed.cameras[0]) == 0
        # The inner sides of the walls: those of the floor are 0.1 m outside.
        assert placed.vertices.min(axis=0) == pytest.approx([-0.1, -0.1, -0.1], abs=1e-12)
        assert placed.vertices.max(axis=0)[:2] - 0.1 == pytest.approx(placed.size, abs=1e-12)
        assert placed.center == (placed.size[0] / 2, placed.size[1] / 2)
        boxes = np.stack([o.box for o in placed.objects])
        assert (boxes[:, :3] - boxes[:, 3:] / 2 > -1e-9).all()
        assert (boxes[:, :2] + boxes[:, 3:5] / 2 < 10).all()  # one digit before the decimal point
    assert turns == {0, 1, 2, 3}


def test_boxes_mesh_and_cameras_move_together(many_rooms: list[Room]) -> None:
    """In the cameras, nothing has moved."""
    for room in many_rooms[:8]:
        placed = corner_frame(room)
        for o, old in zip(placed.objects, room.objects, strict=True):
            own = placed.vertices[np.unique(placed.faces[placed.face_objects == o.object_id])]
            np.testing.assert_allclose([own.min(0), own.max(0)], [o.box[:3] - o.box[3:] / 2, o.box[:3] + o.box[3:] / 2])
            assert -np.pi < o.oriented[6] <= np.pi
            for camera, before in zip(placed.cameras, room.cameras, strict=True):
                now, then = world_to_camera(o.oriented, camera), world_to_camera(old.oriented, before)
                np.testing.assert_allclose(corners(now), corners(then), atol=1e-9)


def test_a_scaled_room_is_scaled_about_the_corner_and_lowered_cameras_keep_the_frame(many_rooms: list[Room]) -> None:
    room = many_rooms[0]
    base = corner_frame(room)
    scaled = corner_frame(shifted("room_scale", room, SHIFTED, np.random.default_rng(0)).room)
    lowered = corner_frame(shifted("camera", room, SHIFTED, np.random.default_rng(0)).room)
    for o, large, same in zip(scaled.objects, base.objects, lowered.objects, strict=True):
        np.testing.assert_allclose(o.box, SHIFTED.shift.room_factor * large.box, atol=1e-12)
        np.testing.assert_array_equal(same.box, large.box)


def test_a_data_set_has_the_pixels_of_the_other_frame(tmp_path: Path) -> None:
    """Images and texts are equal; boxes, poses and proposals are those of the corner frame."""
    options = {"seed": 3, "train_scenes": 1, "val_scenes": 1, "image_size": (64, 48), "frames_per_scene": 8}
    shift = ShiftOptions(("room_scale",))
    center = write_dataset(tmp_path / "center", **options, shift=shift).root
    corner = write_dataset(tmp_path / "corner", **options, shift=shift, world_frame="corner").root
    for path in sorted([*center.glob("posed_images/*/*.[jp][pn]g"), *center.glob("Scan*/*")]):
        assert (corner / path.relative_to(center)).read_bytes() == path.read_bytes()
    for name in ("scene0000_00", "scene5000_00", "scene5000_03"):
        old, new = (load_scene(root, name) for root in (center, corner))
        move = new.frames[0].cam_to_world @ np.linalg.inv(old.frames[0].cam_to_world)
        for frame, before in zip(new.frames, old.frames, strict=True):
            np.testing.assert_allclose(frame.cam_to_world, move @ before.cam_to_world, atol=1e-8)
        for object_id, instance in new.instances.items():
            assert (instance.box[:2] - instance.box[3:5] / 2 > -1e-9).all()
            np.testing.assert_allclose(
                instance.box[:3], move[:3, :3] @ old.instances[object_id].box[:3] + move[:3, 3], atol=1e-8
            )
    proposals = (corner / "proposals/scannet_val_pred_box.json").read_text()
    assert proposals != (center / "proposals/scannet_val_pred_box.json").read_text()


def test_a_position_prior_needs_the_center() -> None:
    with pytest.raises(ValueError, match="world_frame is corner, but shift has position_prior"):
        Options(0, 1, 1, (64, 48), 4, shift=ShiftOptions(("position_prior",)), world_frame="corner")
