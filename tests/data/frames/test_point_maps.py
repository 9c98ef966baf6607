"""Point maps against float64 loops over positions, on a hand-made scene and on synthetic rooms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hand_scene import ALIGN, INTRINSIC, SCENE
from synthetic_truth import SCENES, rebuild_room
from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.images import fitted_size, frame_size, load_frame, place_frame, resize_frames
from w2r2_ds.data.sources.scannet import load_scene
from w2r2_ds.demo.synthetic.render import Renderer, pinhole
from w2r2_ds.demo.synthetic.write import Written
from w2r2_ds.types.geometry import GeometrySpec, PointMapSpec

PATCH = 14


def point_maps(
    frames: Sequence[Path], reference_frame: str = "world", width: int = 56, mode: str = "crop", k: int = 2
) -> np.ndarray:
    """Point maps of frames that are resized as the preprocessor does."""
    sizes = [frame_size(path) for path in frames]
    stacked = fitted_size(sizes, width, PATCH, mode)
    placements = [place_frame(size, stacked, width, PATCH, mode) for size in sizes]
    spec = GeometrySpec(PATCH, 184, PointMapSpec(k, reference_frame))
    return load_point_maps(frames, placements, stacked, spec, threads=2)


def frames_of(root: Path, count: int = 3) -> list[Path]:
    return [root / "posed_images" / SCENE / f"{index:05d}.jpg" for index in range(count)]


def write_depth(path: Path, size: tuple[int, int], seed: int) -> np.ndarray:
    """A depth image of random depths between 2 and 4 m, a fifth of them not measured."""
    rng = np.random.default_rng(seed)
    depth = rng.integers(2000, 4000, (size[1], size[0])).astype(np.uint16)
    depth[rng.random(depth.shape) < 0.2] = 0
    Image.fromarray(depth).save(path)
    return depth


def test_points_equal_a_loop_over_positions(root: Path) -> None:
    """Depth of another size than colour, with its own intrinsics and another field of view; holes; poses."""
    frames = frames_of(root)
    depth_matrix = np.array([[70.0, 0, 44.0, 0], [0, 65.0, 37.0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.savetxt(frames[0].parent / "depth_intrinsic.txt", depth_matrix)
    depths = [write_depth(path.with_suffix(".png"), (90, 75), index) for index, path in enumerate(frames)]
    found = point_maps(frames)
    assert found.shape == (3, 3, 4, 4, 3) and found.dtype == np.float32
    holes = outside = 0
    for frame, path in enumerate(frames):
        pose = ALIGN @ np.loadtxt(path.with_suffix(".txt"))
        for row, column, point in np.ndindex(3, 4, 4):
            # The centre of a quarter of the patch, in the frame of 56 x 42; the colour image has 64 x 48 pixels.
            x = (column * 14 + 3.5 + 7 * (point % 2)) * 64 / 56 - 0.5
            y = (row * 14 + 3.5 + 7 * (point // 2)) * 48 / 42 - 0.5
            ray = (x - INTRINSIC[0, 2]) / INTRINSIC[0, 0], (y - INTRINSIC[1, 2]) / INTRINSIC[1, 1]
            u, v = round(70 * ray[0] + 44), round(65 * ray[1] + 37)
            inside = 0 <= u < 90 and 0 <= v < 75
            outside += not inside
            if not inside or depths[frame][v, u] == 0:
                holes += 1
                assert np.isnan(found[frame, row, column, point]).all()
                continue
            z = float(depths[frame][v, u]) / 1000
            expected = pose @ [z * (u - 44) / 70, z * (v - 37) / 65, z, 1]
            # float32 of coordinates below 16 m: 1e-6 m
            np.testing.assert_allclose(found[frame, row, column, point], expected[:3], rtol=0, atol=1e-6)
    assert 20 < holes < 100 and 0 < outside < holes


def test_coordinate_systems(root: Path) -> None:
    frames = frames_of(root)
    for index, path in enumerate(frames):
        write_depth(path.with_suffix(".png"), (64, 48), index)
    poses = [frame.cam_to_world for frame in load_scene(root, SCENE).frames]
    by_system = {name: point_maps(frames, name).astype(np.float64) for name in ("world", "camera", "first", "last")}

    def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return points @ matrix[:3, :3].T + matrix[:3, 3]

    for index, pose in enumerate(poses):
        world = moved(by_system["camera"][index], pose)
        np.testing.assert_allclose(by_system["world"][index], world, rtol=0, atol=2e-6)
        for name, origin in (("first", poses[0]), ("last", poses[-1])):
            expected = moved(world, np.linalg.inv(origin))
            np.testing.assert_allclose(by_system[name][index], expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(by_system["first"][0], by_system["camera"][0])
    assert np.nanmin(by_system["camera"][..., 2]) >= 2.0, "z is the depth"
    assert np.nanmax(np.abs(by_system["first"][2] - by_system["camera"][2])) > 1.0, "frame 2 is turned by 180 degrees"


def test_poses_are_not_read_for_camera_coordinates(root: Path) -> None:
    frames = frames_of(root, 4)  # tracking is lost in frame 3
    assert np.isfinite(point_maps(frames[:3], "camera")).all()
    assert np.isnan(point_maps(frames, "camera")[3]).all(), "its depth image is empty"
    with pytest.raises(ValueError, match=r"00003\.txt"):
        point_maps(frames, "world")


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_portrait_frames_are_cropped_and_padded_as_the_pixels(root: Path, mode: str) -> None:
    """The point of a position is that of the colour pixel that the resized frame shows there."""
    (path,) = frames_of(root, 1)
    height, width = 96, 60
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    ramp = np.stack([columns, rows, np.full_like(rows, 7)], axis=-1)  # red is x, green is y
    Image.fromarray(ramp).save(path, format="PNG")
    assert (load_frame(path) == ramp).all()
    matrix = np.array([[50.0, 0, 29.5, 0], [0, 50.0, 47.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.savetxt(path.parent / "intrinsic.txt", matrix)
    # The depth image has twice the field of view: there is depth behind the white border, too.
    np.savetxt(path.parent / "depth_intrinsic.txt", np.add(matrix, [[0, 0, 30, 0], [0, 0, 48, 0], [0] * 4, [0] * 4]))
    Image.fromarray(np.full((2 * height, 2 * width), 1000, dtype=np.uint16)).save(path.with_suffix(".png"))
    resized = resize_frames([ramp], 56, PATCH, mode)[0].astype(float)
    found = point_maps([path], "camera", mode=mode)[0]
    shown = 0
    for row, column, point in np.ndindex(found.shape[:3]):
        x, y = column * 14 + 3 + 7 * (point % 2), row * 14 + 3 + 7 * (point // 2)  # the pixel of the position
        if resized[2, y, x] > 200:  # the white border
            assert np.isnan(found[row, column, point]).all()
            continue
        shown += 1
        pixel = found[row, column, point, :2] * 50 + (29.5, 47.5)
        assert np.abs(pixel - resized[:2, y, x]).max() <= 1.0  # half a pixel, and bicubic interpolation of the ramp
    assert shown == (64 if mode == "crop" else 32)


def test_every_point_of_an_object_lies_in_its_box(rooms: Written) -> None:
    """Synthetic rooms: the object that a position shows, from the renderer, has the point in its box."""
    for name in SCENES:
        room = rebuild_room(rooms.root, name)
        renderer = Renderer(room, (160, 120), pinhole((160, 120)))
        frames = sorted((rooms.root / "posed_images" / name).glob("*.jpg"))[::3]
        found = point_maps(frames, "world").astype(np.float64)
        boxes = {o.object_id: np.asarray(o.box) for o in room.objects}
        seen, floor = set(), 0
        for frame, path in enumerate(frames):
            owners = renderer.render(room.cameras[int(path.stem)])[2]
            for row, column, point in np.ndindex(found.shape[1:4]):
                x = round((column * 14 + 3.5 + 7 * (point % 2)) * 160 / 56 - 0.5)
                y = round((row * 14 + 3.5 + 7 * (point // 2)) * 120 / 42 - 0.5)
                where, owner = found[frame, row, column, point], int(owners[y, x])
                if owner in boxes:
                    seen.add(owner)
                    box = boxes[owner]
                    # Depths are rounded to millimetres.
                    assert (np.abs(where - box[:3]) <= box[3:6] / 2 + 2e-3).all(), (name, path, owner)
                floor += abs(where[2]) < 2e-3
        assert len(seen) >= 4 and floor > 20


@pytest.mark.parametrize("k", [1, 2, 7])
def test_points_per_side(root: Path, k: int) -> None:
    """The mean of the positions of a patch is its centre: on a wall in front of the camera, also that of the points."""
    (path,) = frames_of(root, 1)
    matrix: Any = INTRINSIC.copy()
    matrix[:2] *= 10
    Image.fromarray(np.full((480, 640), 3000, dtype=np.uint16)).save(path.with_suffix(".png"))
    np.savetxt(path.parent / "depth_intrinsic.txt", matrix)
    found = point_maps([path], "camera", k=k)[0]
    assert found.shape == (3, 4, k * k, 3)
    centres = found.mean(axis=2)
    for row, column in np.ndindex(3, 4):
        x, y = (column + 0.5) * 16 - 0.5, (row + 0.5) * 16 - 0.5
        expected = 3 * (x - 31.5) / 40, 3 * (y - 23.5) / 40
        # Half a depth pixel at 3 m is 3.75 mm.
        np.testing.assert_allclose(centres[row, column, :2], expected, rtol=0, atol=4e-3)
