"""A hand-made scene in ScanNet's layout, with numbers that can be checked by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from w2r2_ds.data.frames.selection import FrameOptions
from w2r2_ds.data.prepare.pipeline import prepare_scene
from w2r2_ds.data.prepare.plan import make_plan
from w2r2_ds.data.tasks.base import SkippedItem, TaskOptions

ALIGN = np.array([[0.0, -1.0, 0.0, 0.5], [1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 1.0, 0.25], [0.0, 0.0, 0.0, 1.0]])
CAMERA = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 2.0], [0.0, -1.0, 0.0, 1.5], [0.0, 0.0, 0.0, 1.0]])
"""Camera at (1, 2, 1.5) that faces world +y."""
INTRINSIC = np.array([[40.0, 0.0, 31.5, 0.0], [0.0, 40.0, 23.5, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
SCENE = "scene0000_00"
BOXES = np.array(
    [
        [2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 5, 0],  # visible; camera coordinates (1, 0.5, 3) in frame 0
        [1.0, 8.0, 1.5, 0.5, 0.5, 0.5, 5, 3],  # behind the surface in the depth images
        [0.0, 5.0, 1.0, 0.6, 0.6, 0.6, 7, 4],  # visible
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0],  # ScanRefer's row for an instance without points
    ]
)


def moved(forward: float, back_to_front: bool = False) -> np.ndarray:
    """``CAMERA`` moved along y by `forward` metres, and turned by 180 degrees if `back_to_front`."""
    camera = CAMERA.copy()
    camera[1, 3] += forward
    return camera @ np.diag([-1.0, 1.0, -1.0, 1.0]) if back_to_front else camera


def write_scene(root: Path, scene_id: str = SCENE) -> None:
    """Write frames 0 (3 m before a wall in the depth image), 1 (1 m nearer), 2 (turned away), 3 (no valid pose)."""
    images = root / "posed_images" / scene_id
    images.mkdir(parents=True)
    cameras = [moved(0.0), moved(1.0), moved(0.0, back_to_front=True), np.full((4, 4), -np.inf)]
    for i, camera in enumerate(cameras):
        pose = np.linalg.inv(ALIGN) @ camera if np.isfinite(camera).all() else camera
        np.savetxt(images / f"{i:05d}.txt", pose)
        Image.new("RGB", (64, 48), (i * 10, 0, 0)).save(images / f"{i:05d}.jpg")
        depth = np.full((48, 64), (3000, 2000, 3000, 0)[i], dtype=np.uint16)
        Image.fromarray(depth).save(images / f"{i:05d}.png")
    for file in ("intrinsic.txt", "depth_intrinsic.txt"):
        np.savetxt(images / file, INTRINSIC)
    (root / "scans" / scene_id).mkdir(parents=True)
    words = " ".join(str(value) for value in ALIGN.ravel())
    (root / "scans" / scene_id / f"{scene_id}.txt").write_text(f"axisAlignment = {words} \nnumDepthFrames = 4\n")
    (root / "scannet_data").mkdir(exist_ok=True)
    np.save(root / "scannet_data" / f"{scene_id}_aligned_bbox.npy", BOXES)


def entry(object_id: int = 0, name: str = "office_chair", ann_id: int = 0, text: str = "The Red Chair.") -> dict:
    """A valid entry of ScanRefer's JSON file."""
    return {
        "scene_id": SCENE,
        "object_id": str(object_id),
        "object_name": name,
        "ann_id": str(ann_id),
        "description": text,
        "token": text.lower().split(),
    }


def write_annotations(root: Path, entries: object, split: str = "train") -> Path:
    path = root / "ScanRefer" / f"ScanRefer_filtered_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


INSTANCES: list[tuple[int, str, list[float]]] = [
    (7, "chair", [2.0, 5.0, 1.0, 0.8, 0.6, 1.0, 0.0, 0.0, 0.0]),  # object 0
    (5, "wall", [0.0, 9.0, 1.0, 8.0, 0.2, 3.0, 0.0, 0.0, 0.0]),
    (9, "table", [0.0, 5.0, 1.0, 0.6, 0.6, 0.6, 0.3, 0.0, 0.0]),  # object 4, turned by 0.3
    (3, "lamp", [1.0, 8.0, 1.9, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0]),  # object 3 moved by 0.4: IoU 0.111
]
"""Number, category and box of EmbodiedScan's instances."""
VISIBLE = [[1, 0], [0, 2, 1], [], [0]]
"""Per frame, the indices in `INSTANCES` of visible instances; frame 3 has no valid pose."""


def write_infos(root: Path, split: str = "train", scene_ids: tuple[str, ...] = (SCENE,)) -> None:
    """Write EmbodiedScan's info file for copies of the scene."""
    names = sorted({label for _, label, _ in INSTANCES})
    scenes = []
    for scene_id in scene_ids:
        folder = root / "posed_images" / scene_id
        images = [
            {
                "img_path": f"scannet/posed_images/{scene_id}/{i:05d}.jpg",
                "cam2global": np.loadtxt(folder / f"{i:05d}.txt"),
                "visible_instance_ids": seen,
            }
            for i, seen in enumerate(VISIBLE)
        ]
        instances = [
            {"bbox_3d": box, "bbox_label_3d": names.index(label), "bbox_id": number} for number, label, box in INSTANCES
        ]
        scenes.append(
            {
                "sample_idx": f"scannet/{scene_id}",
                "axis_align_matrix": ALIGN,
                "images": images,
                "instances": instances,
            }
        )
    content = {"metainfo": {"categories": {name: i for i, name in enumerate(names)}}, "data_list": scenes}
    path = root / "embodiedscan" / f"embodiedscan_infos_{split}.pkl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def write_proposals(root: Path, boxes: list[list[float]], split: str = "val") -> None:
    path = root / "proposals" / f"scannet_{split}_pred_box.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({f"scannet/{SCENE}": boxes}))


def question_entry(number: int = 0, answers: list[str] | None = None, objects: tuple[int, ...] = (0,)) -> dict:
    """A valid entry of ScanQA's JSON file."""
    return {
        "scene_id": SCENE,
        "question_id": f"val-scene0000-{number}",
        "question": " What color is the chair?",
        "answers": ["red", "dark red"] if answers is None else answers,
        "object_ids": list(objects),
        "object_names": ["chair" for _ in objects],
    }


def write_questions(root: Path, entries: object, split: str = "train") -> Path:
    path = root / "ScanQA" / f"ScanQA_v1.0_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def prepared_items(root: Path, task: str, split: Any = "train", count: int = 2, **options: Any) -> list[Any]:
    """Prepare a task; returns samples and skipped items. Frames are sampled uniformly by default."""
    frames = options.pop("frames", FrameOptions("uniform", count))
    plan = make_plan(root, TaskOptions(task, split, **{"frames": frames, **options}))
    return [item for job in plan.jobs for _, item in prepare_scene(root, plan.options, job)[0]]


def reasons(items: list[Any]) -> dict[str, str]:
    """Id -> reason, for the skipped items."""
    return {each.id: each.reason for each in items if isinstance(each, SkippedItem)}
