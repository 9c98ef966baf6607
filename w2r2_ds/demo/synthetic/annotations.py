"""EmbodiedScan's annotations of the synthetic scans: oriented boxes, poses, and what each image sees."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.sources.scannet import Frame
from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.rooms import HEIGHT, Room, RoomObject

_WORDS = {"sofa": "couch", "bookshelf": "shelf", "nightstand": "stand", "trash can": "bin"}
"""EmbodiedScan's words for classes that it calls otherwise than ScanRefer."""
LABELS = {name: _WORDS.get(name, name) for name in KINDS}
"""Class of ``furniture.KINDS`` to EmbodiedScan's category."""
CATEGORIES = {label: number for number, label in enumerate(sorted(LABELS.values()), start=1)}
"""``metainfo.categories``: category to ``bbox_label_3d``."""


def scene_info(
    scene_id: str,
    objects: Sequence[RoomObject],
    frames: Sequence[Frame],
    poses: Sequence[np.ndarray],
    seen: Sequence[list[int]],
    axis_align: np.ndarray,
    intrinsic: np.ndarray,
) -> dict[str, Any]:
    """One entry of ``data_list``. ``bbox_id`` is the place in ``instances``, so ids and places of what is seen agree.

    Args:
        scene_id: ScanNet-like name.
        objects: all objects; ``objects[i].object_id == i``.
        frames: posed frames.
        poses: ``[4, 4]`` float64 per frame, camera to *raw* world: ``cam2global``.
        seen: ids of the objects that each frame sees.
        axis_align: ``[4, 4]`` float64, raw world to aligned world.
        intrinsic: ``[4, 4]`` float64, of both kinds of image.
    """
    folder = f"scannet/posed_images/{scene_id}"
    images = [
        {
            "img_path": f"{folder}/{frame.color.name}",
            "depth_path": f"{folder}/{frame.depth.name}",
            "cam2global": pose,
            "visible_instance_ids": ids,
        }
        for frame, pose, ids in zip(frames, poses, seen, strict=True)
    ]
    instances = [
        {
            "bbox_3d": [float(number) for number in o.oriented],
            "bbox_label_3d": CATEGORIES[LABELS[o.name]],
            "bbox_id": o.object_id,
        }
        for o in objects
    ]
    return {
        "sample_idx": f"scannet/{scene_id}",
        "axis_align_matrix": axis_align,
        "cam2img": intrinsic,
        "depth_cam2img": intrinsic.copy(),
        "images": images,
        "instances": instances,
    }


def write_infos(path: Path, infos: Sequence[dict[str, Any]]) -> None:
    """Write a file like EmbodiedScan's: a pickled plain dictionary of ``metainfo`` and ``data_list``."""
    # A pickle shows which equal objects are one object; copied by pickling, that does not depend on who made the infos.
    data_list = [pickle.loads(pickle.dumps(info)) for info in infos]
    content = {"metainfo": {"dataset": "EmbodiedScan", "categories": CATEGORIES}, "data_list": data_list}
    path.write_bytes(pickle.dumps(content, protocol=4))


ABSENT, BAD = 0.06, 0.08
"""Shares of the objects that are not proposed at all, and that are proposed with an IoU below 0.5."""
FALSE = (1, 4)
"""Smallest and largest number of proposals per room where nothing is."""


def propose(rng: np.random.Generator, room: Room) -> np.ndarray:
    """Proposals of one room in random order, ``[n, 6]`` float64: centre and size, aligned world, metres.

    A jittered box keeps an IoU of at least 0.5 with its object: its centre moves by at most 8 % of the size and
    each size changes by at most 12 %. A bad one is shifted by 40 to 70 % of its size, which leaves an IoU of at most
    0.6 / 1.4.
    """
    boxes = []
    for o in room.objects:
        fate = rng.random()
        if fate < ABSENT:
            continue
        center, size = o.box[:3].copy(), o.box[3:].copy()
        if fate < ABSENT + BAD:
            axis = int(rng.integers(2))
            center[axis] += rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.7) * size[axis]
        else:
            center += np.clip(rng.normal(0.0, 0.03, 3), -0.08, 0.08) * size
            size *= 1.0 + np.clip(rng.normal(0.0, 0.05, 3), -0.12, 0.12)
        boxes.append(np.concatenate([center, size]))
    boxes += _false(rng, room, int(rng.integers(FALSE[0], FALSE[1] + 1)))
    return np.array(boxes)[rng.permutation(len(boxes))]


def _false(rng: np.random.Generator, room: Room, count: int) -> list[np.ndarray]:
    """Boxes in the room that touch no object."""
    real = np.stack([o.box for o in room.objects])
    found: list[np.ndarray] = []
    while len(found) < count:
        size = rng.uniform(0.2, 0.6, 3)
        space = np.array([*room.size, HEIGHT]) - size
        center = rng.uniform(-0.5, 0.5, 3) * space + (0.0, 0.0, HEIGHT / 2)
        if (np.abs(center - real[:, :3]) * 2 > size + real[:, 3:]).any(axis=1).all():
            found.append(np.concatenate([center, size]))
    return found
