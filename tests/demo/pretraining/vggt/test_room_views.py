"""Rendered views of rooms: geometry of mirrored rooms, and independence of the order of use."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.demo.pretraining.vggt.room_views import IMAGE_SIZE, Choice, RoomViews, ViewBatch
from w2r2_ds.models.vggt.cameras import unproject_depth

VIEWS = (3, 0, 20)


@pytest.fixture(scope="module")
def rooms() -> RoomViews:
    return RoomViews(0, "val")


@pytest.fixture(scope="module")
def batch(rooms: RoomViews) -> ViewBatch:
    """A room and its mirror image."""
    return rooms.batch([Choice(0, VIEWS), Choice(0, VIEWS, mirrored=True)])


def test_a_batch_has_the_documented_shapes(batch: ViewBatch) -> None:
    width, height = IMAGE_SIZE
    assert batch.images.shape == (2, 3, 3, height, width) and batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and 0.5 < batch.images.max() <= 1
    assert batch.depth.shape == (2, 3, height, width)
    assert batch.intrinsics.shape == (2, 3, 3, 3) and batch.world_to_camera.shape == (2, 3, 3, 4)


def test_points_are_inside_the_room(batch: ViewBatch) -> None:
    """Rooms are 2.6 m high, centred on the origin, and at most 6.8 m x 6.2 m; depth is in metres."""
    points = unproject_depth(batch.depth, batch.intrinsics, batch.world_to_camera)
    limit = torch.tensor([3.41, 3.11, 2.61])
    assert (points.abs() < limit).all() and points[..., 2].min() > -0.01


def test_a_mirrored_room_has_mirrored_points_and_rigid_cameras(batch: ViewBatch) -> None:
    points = unproject_depth(batch.depth, batch.intrinsics, batch.world_to_camera)
    mirrored = points[0].flip(-2) * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(points[1], mirrored, rtol=0, atol=1e-4)  # float32, metres
    torch.testing.assert_close(torch.linalg.det(batch.world_to_camera[1, :, :, :3]), torch.ones(3))
    assert torch.equal(batch.images[1], batch.images[0].flip(-1))


def test_a_room_does_not_depend_on_the_rooms_before_it(rooms: RoomViews, batch: ViewBatch) -> None:
    again = RoomViews(0, "val").batch([Choice(0, VIEWS)])
    assert torch.equal(again.images[0], batch.images[0]) and torch.equal(again.depth[0], batch.depth[0])
    other = RoomViews(0, "train").batch([Choice(0, VIEWS)])
    assert not torch.equal(other.depth[0], batch.depth[0])
