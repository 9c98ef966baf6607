"""Cue of a shifted room: the box that follows from the pixels if everything else is as in training.

A model without geometry measures where an object is in the image, and completes the third dimension by what it is used
to. `assumed_box` computes its box in the coordinates of a frame's camera:

``furniture_scale``  an object has its usual size. One that is ``factor`` times larger is placed nearer by this factor.
``focal_length``     the focal length is that of training. An object that is magnified is placed nearer.
``room_scale``       the room has its usual size: all coordinates are divided by the factor.
``camera``           height and pitch are those of the frame in ``val``. The ray through the middle of the object's
                     bottom meets the floor at another distance. Only objects on the floor have this cue.
``position_prior``   the object stands on the side of its colour or class; in the camera nothing changes.

The pose that moves this box to the world is the frame's for an answer in its camera's coordinates (the evaluation uses
the true pose). For an answer in world coordinates it is the pose that the model is used to, that of the frame in
``val``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from w2r2_ds.boxes3d.transforms import camera_to_world, world_to_camera
from w2r2_ds.demo.synthetic.options import Options
from w2r2_ds.demo.synthetic.rooms import RoomObject
from w2r2_ds.demo.synthetic.shift.variants import Variant, room_layout

_ON_FLOOR = 1e-6
_FARTHEST = 15.0
"""Largest distance in metres at which a ray may meet the floor; a ray near the horizon gives no cue."""
_DECIMALS = 6
"""Digits of the numbers in the file: micrometres."""


def box9(o: RoomObject) -> np.ndarray:
    """Annotated world box ``[9]`` of an object: axis-aligned, as in ScanRefer."""
    return np.concatenate([o.box, np.zeros(3)])


def object_cue(
    shift: str, options: Options, base: Variant, shifted: Variant, object_id: int, areas: dict[int, float]
) -> dict[str, Any]:
    """The fields of a `ShortcutCue` that depend on the object, as JSON values.

    Args:
        shift: name of the shift.
        options: options of the data set.
        base: the room of ``val``.
        shifted: the room of ``val_NAME``.
        object_id: object of the description.
        areas: number of every frame that shows the object -> `clear_area` of its box, square pixels.
    """
    truth, o = box9(shifted.room.objects[object_id]), base.room.objects[object_id]
    prior = room_layout(options).prior
    parameters: dict[str, Any] = options.shift.parameters(shift)
    if shift == "furniture_scale":
        parameters = {"factor": round(shifted.factors[object_id], _DECIMALS)}
    # The 10 % of objects on the other side in `val` stand, after the turn, where the prior places them.
    conforms = prior is None or prior.side(o.name, o.color) * o.box[0] > 0
    frames = []
    for frame, area in areas.items() if conforms else ():
        used, pose = base.room.cameras[frame], shifted.room.cameras[frame]
        box = assumed_box(shift, options, truth, shifted.factors[object_id], pose, used)
        if box is not None:
            camera, world = camera_to_world(box, pose), camera_to_world(box, used)
            frames.append(
                {"frame": frame, "area": round(area, 3), "camera": _rounded(camera), "world": _rounded(world)}
            )
    return {"parameters": parameters, "truth": _rounded(truth), "paired_truth": _rounded(box9(o)), "frames": frames}


def assumed_box(
    shift: str, options: Options, truth: np.ndarray, factor: float, pose: np.ndarray, used: np.ndarray
) -> np.ndarray | None:
    """Box ``[9]`` in a frame's camera that follows from the pixels; None if there is no such box.

    Args:
        shift: name of the shift.
        options: options of the data set.
        truth: ``[9]`` annotated world box in the shifted room.
        factor: factor of the object's size (``furniture_scale``).
        pose: ``[4, 4]`` pose of the frame in the shifted room.
        used: ``[4, 4]`` pose of the frame in ``val``.
    """
    if shift == "camera":
        return _on_floor(truth, pose, used)
    box = world_to_camera(truth, pose)
    if shift == "furniture_scale":
        box[:6] /= factor
    elif shift == "room_scale":
        box[:6] /= options.shift.room_factor
    elif shift == "focal_length":
        box[2] /= options.shift.focal_factor
    return box


def _on_floor(truth: np.ndarray, pose: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    """The box on the floor with the pixel of its middle, if the frame had the pose ``used``; see `assumed_box`."""
    bottom = truth[:3] - (0.0, 0.0, truth[5] / 2)
    if abs(bottom[2]) > _ON_FLOOR:
        return None
    in_camera = pose[:3, :3].T @ (bottom - pose[:3, 3])
    ray, eye = used[:3, :3] @ in_camera, used[:3, 3]
    if ray[2] >= 0:  # at or above the horizon
        return None
    point = eye - ray * (eye[2] / ray[2])
    if np.linalg.norm(point - eye) > _FARTHEST:
        return None
    return world_to_camera(np.concatenate([point + np.array([0.0, 0.0, truth[5] / 2]), truth[3:]]), used)


def _rounded(box: np.ndarray) -> list[float]:
    return [round(float(number), _DECIMALS) + 0.0 for number in box]
