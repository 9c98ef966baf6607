"""EmbodiedScan's annotations of the synthetic scans: oriented boxes, poses, and what each image sees."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.data.scannet import Frame
from w2r2_ds.data.synthetic.furniture import KINDS
from w2r2_ds.data.synthetic.rooms import RoomObject

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
