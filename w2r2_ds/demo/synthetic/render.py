"""Render RGB and depth images of a room by ray casting: one ray per pixel, no shadows, no reflections."""

from __future__ import annotations

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from w2r2_ds.demo.synthetic.rooms import FLOOR_ID, Room

_LIGHT = np.array([0.35, -0.25, 0.9]) / np.linalg.norm([0.35, -0.25, 0.9])
"""Unit vector towards the light."""
_TILE = 0.5
"""Side of a square of the chequered floor, metres."""


def pinhole(image_size: tuple[int, int], factor: float = 1.0) -> np.ndarray:
    """Intrinsics ``[4, 4]`` float64 for (width, height): ``factor`` times ScanNet's focal length (58 degrees).

    Integer pixel coordinates are pixel centres; the principal point is the middle of the image.
    """
    width, height = image_size
    focal = width * 1170.0 / 1296.0 * factor
    matrix = np.eye(4)
    matrix[0, 0] = matrix[1, 1] = focal
    matrix[0, 2], matrix[1, 2] = (width - 1) / 2, (height - 1) / 2
    return matrix


class Renderer:
    """Ray caster for one room; the acceleration structure is built once.

    Args:
        room: room to render.
        image_size: width and height in pixels.
        intrinsic: ``[4, 4]`` pinhole matrix.
    """

    def __init__(self, room: Room, image_size: tuple[int, int], intrinsic: np.ndarray) -> None:
        self._room = room
        self._size = image_size
        self._scene = EmbreeScene()
        triangles = room.vertices[room.faces]
        self._mesh = TriangleMesh(self._scene, triangles.astype(np.float32))
        normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        self._normals = normals
        # Shading: a diffuse part, which depends on the light, and a part that grows as a face turns to the camera.
        self._colors = (room.face_colors * (0.5 + 0.32 * np.maximum(normals @ _LIGHT, 0.0))[:, None]).astype(np.float32)
        self._gloss = (room.face_colors * 0.18).astype(np.float32)
        # Rays in the camera's frame with z = 1, [pixels, 3], and the same as unit vectors.
        columns, rows = np.meshgrid(np.arange(image_size[0]), np.arange(image_size[1]))
        x = (columns - intrinsic[0, 2]) / intrinsic[0, 0]
        y = (rows - intrinsic[1, 2]) / intrinsic[1, 1]
        self._rays = np.stack([x, y, np.ones(x.shape)], axis=-1).reshape(-1, 3).astype(np.float32)
        self._units = self._rays / np.linalg.norm(self._rays, axis=1, keepdims=True)

    def render(self, cam_to_world: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Render one view.

        Args:
            cam_to_world: ``[4, 4]`` float64, OpenCV camera to aligned world.

        Returns:
            color ``[height, width, 3]`` uint8; depth ``[height, width]`` uint16, millimetres along the camera's z axis;
            objects ``[height, width]`` int64, object id of each pixel, negative for walls, floor and ceiling.
        """
        room, (width, height) = self._room, self._size
        eye = cam_to_world[:3, 3].astype(np.float32)
        rays = self._rays @ cam_to_world[:3, :3].T.astype(np.float32)
        hits = self._scene.run(np.tile(eye, (len(rays), 1)), rays, output=1)
        face = hits["primID"]
        if face.min() < 0:
            raise ValueError("a ray of a synthetic camera hits no wall; keep the camera path inside the room")
        depth = hits["tfar"]  # in units of the ray's length; rays have z = 1 in the camera's frame, so it is the depth
        local = (self._normals @ cam_to_world[:3, :3]).astype(np.float32)  # normals in the camera's frame
        facing = np.abs(np.einsum("ij,ij->i", local[face], self._units))
        color = self._colors[face] + self._gloss[face] * facing[:, None]
        owner = room.face_objects[face]
        # Chequered floor: neighbouring squares differ in brightness.
        floor = np.flatnonzero(owner == FLOOR_ID)
        points = eye[:2] + rays[floor, :2] * depth[floor, None]
        color[floor] *= (0.95 + 0.07 * (np.floor(points / _TILE).sum(axis=1) % 2)).astype(np.float32)[:, None]
        millimetres = np.rint(np.minimum(depth * 1000.0, 65535.0))
        return (
            np.minimum(color, 255.0).astype(np.uint8).reshape(height, width, 3),
            millimetres.astype(np.uint16).reshape(height, width),
            owner.reshape(height, width),
        )
