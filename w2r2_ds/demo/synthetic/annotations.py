"""Annotations of synthetic scenes in EmbodiedScan's format (boxes, poses, visibility), and detector proposals."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.demo.synthetic.furniture import KINDS
from w2r2_ds.demo.synthetic.rooms import Room, RoomObject

_RENAMED = {"sofa": "couch", "bookshelf": "shelf", "nightstand": "stand", "trash can": "bin"}
"""Classes with another name in EmbodiedScan than in ScanRefer."""
LABELS = {name: _RENAMED.get(name, name) for name in KINDS}
"""Class of ``furniture.KINDS`` -> EmbodiedScan's category."""
CATEGORIES = {label: number for number, label in enumerate(sorted(LABELS.values()), start=1)}
"""``metainfo.categories``: category -> ``bbox_label_3d``."""


def scene_info(
    scene_id: str,
    objects: Sequence[RoomObject],
    frames: Sequence[Frame],
    poses: Sequence[np.ndarray],
    visible_ids: Sequence[list[int]],
    axis_align: np.ndarray,
    intrinsic: np.ndarray,
) -> dict[str, Any]:
    """One entry of ``data_list``; ``bbox_id`` and ``visible_instance_ids`` are indices in ``instances``.

    Args:
        scene_id: ScanNet-like name.
        objects: all objects; ``objects[i].object_id == i``.
        frames: posed frames.
        poses: ``[4, 4]`` float64 per frame, ``cam2global``: camera to *raw* world.
        visible_ids: ids of the objects that are visible in each frame.
        axis_align: ``[4, 4]`` float64, raw world to aligned world.
        intrinsic: ``[4, 4]`` float64, of colour and depth images.
    """
    folder = f"scannet/posed_images/{scene_id}"
    images = [
        {
            "img_path": f"{folder}/{frame.color.name}",
            "depth_path": f"{folder}/{frame.depth.name}",
            "cam2global": pose,
            "visible_instance_ids": ids,
        }
        for frame, pose, ids in zip(frames, poses, visible_ids, strict=True)
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
    """Write a pickled dictionary with ``metainfo`` and ``data_list``, as EmbodiedScan's files."""
    # A pickle stores an object once and then references to it. Entries from worker processes have other shared objects
    # than entries from this process. After a round trip both share the same ones, so the file has the same bytes.
    data_list = [pickle.loads(pickle.dumps(info)) for info in infos]
    content = {"metainfo": {"dataset": "EmbodiedScan", "categories": CATEGORIES}, "data_list": data_list}
    path.write_bytes(pickle.dumps(content, protocol=4))


ABSENT, BAD = 0.06, 0.08
"""Share of objects without a proposal, and share of objects whose proposal has an IoU below 0.5."""
FALSE_POSITIVES = (1, 4)
"""Minimum and maximum number of proposals per room that overlap no object."""


def propose(rng: np.random.Generator, room: Room) -> np.ndarray:
    """Simulated detector output for one room, ``[n, 6]`` float64 in random order: centre, size; aligned world, metres.

    A good proposal has an IoU of at least 0.5 with its object: its centre moves by at most 8 % of the size, and each
    size changes by at most 12 %. A bad one is shifted by 40 to 70 % of its size: its IoU is at most 0.6 / 1.4.
    """
    boxes = []
    for o in room.objects:
        drawn = rng.random()
        if drawn < ABSENT:
            continue
        center, size = o.box[:3].copy(), o.box[3:].copy()
        if drawn < ABSENT + BAD:
            axis = int(rng.integers(2))
            center[axis] += rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.7) * size[axis]
        else:
            center += np.clip(rng.normal(0.0, 0.03, 3), -0.08, 0.08) * size
            size *= 1.0 + np.clip(rng.normal(0.0, 0.05, 3), -0.12, 0.12)
        boxes.append(np.concatenate([center, size]))
    boxes += _false_positives(rng, room, int(rng.integers(FALSE_POSITIVES[0], FALSE_POSITIVES[1] + 1)))
    return np.array(boxes)[rng.permutation(len(boxes))]


def _false_positives(rng: np.random.Generator, room: Room, count: int) -> list[np.ndarray]:
    """Boxes in the room that overlap no object."""
    real = np.stack([o.box for o in room.objects])
    found: list[np.ndarray] = []
    while len(found) < count:
        size = rng.uniform(0.2, 0.6, 3)
        space = np.array([*room.size, room.height]) - size
        center = rng.uniform(-0.5, 0.5, 3) * space + (*room.center, room.height / 2)
        # Two boxes are disjoint if they are apart along any axis; the box must be disjoint from all objects.
        if (np.abs(center - real[:, :3]) * 2 > size + real[:, 3:]).any(axis=1).all():
            found.append(np.concatenate([center, size]))
    return found
