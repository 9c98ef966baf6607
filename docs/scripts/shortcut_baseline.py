"""A 2D baseline on the shortcut benchmark: ``python docs/scripts/shortcut_baseline.py [FOLDER]``.

A random forest gets what a perfect 2D detector gives: rectangle of the projected box, class, colour. It answers centre
and size, in the camera of the frame or in the world, and is trained on the training rooms. Prints the second table of
docs/research/shortcut-benchmark.md in Markdown. The rooms are written to FOLDER or reused; default: a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.ensemble import RandomForestRegressor

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.data.frames.projection import clipped_corners
from w2r2_ds.data.sources.embodiedscan import read_infos
from w2r2_ds.data.sources.frames import Frame
from w2r2_ds.data.sources.scannet import Scene, load_scene
from w2r2_ds.data.sources.shortcut_cues import ShortcutCue, cues_file, read_cues
from w2r2_ds.demo.synthetic.annotations import CATEGORIES
from w2r2_ds.demo.synthetic.options import SHIFTS, ShiftOptions
from w2r2_ds.demo.synthetic.write import write_dataset
from w2r2_ds.diagnostics.shortcut_cue import cue_shares

TRAIN, VAL, FRAMES, SIZE = 200, 40, 12, (160, 120)
"""Training rooms, validation rooms, frames per room, and size of an image in pixels."""
FOLDERS = {
    "shifts": ShiftOptions(tuple(name for name in SHIFTS if name != "position_prior")),
    "prior_0.5": ShiftOptions(("position_prior",), prior_strength=0.5),
    "prior_0.9": ShiftOptions(("position_prior",), prior_strength=0.9),
}
"""Folder -> shifts and strengths; 0.5 plants no prior."""
Coordinates = Literal["camera", "world"]
Key = tuple[str, int, int]
"""Scene, object, frame."""


@dataclass(frozen=True)
class Detection:
    """An object in a frame.

    Attributes:
        features: rectangle (pixels), mean colour of its middle, class as one-hot numbers.
        camera: ``[6]`` centre in the frame's camera and size in the world, metres.
        world: ``[6]`` centre and size in the world, metres.
        pose: ``[4, 4]`` camera to world.
    """

    features: np.ndarray
    camera: np.ndarray
    world: np.ndarray
    pose: np.ndarray

    @property
    def area(self) -> float:
        """Area of the rectangle, square pixels."""
        return float(np.prod(self.features[2:4] - self.features[:2]))


def detections(root: Path, split: str) -> dict[Key, Detection]:
    """All visible objects of a split."""
    found = {}
    for scene_id, info in read_infos(root / "embodiedscan" / f"embodiedscan_infos_{split}.pkl").items():
        scene = load_scene(root, scene_id)
        for frame in scene.frames:
            for object_id in info.visible[frame.index]:
                label = CATEGORIES[info.instances[object_id].label]
                detected = detect(scene, frame, scene.instances[object_id].box, label)
                if detected is not None:
                    found[scene_id, object_id, frame.index] = detected
    return found


def detect(scene: Scene, frame: Frame, box: np.ndarray, label: int) -> Detection | None:
    """The detection of a world box ``[6]``; None if the camera is in the box."""
    points = clipped_corners(box, frame.cam_to_world, scene.intrinsic, SIZE)
    if not len(points):
        return None
    low, high = points.min(axis=0), points.max(axis=0)
    middle = np.concatenate([low * 0.75 + high * 0.25, low * 0.25 + high * 0.75 + 1])
    with Image.open(frame.color) as image:
        color = np.asarray(image.crop([int(each) for each in middle])).reshape(-1, 3).mean(axis=0)
    features = np.concatenate([low, high, color, np.eye(len(CATEGORIES) + 1)[label]])
    camera = world_to_camera(np.append(box, np.zeros(3)), frame.cam_to_world)[:6]
    return Detection(features, camera, box, frame.cam_to_world)


def fit(found: Mapping[Key, Detection], coordinates: Coordinates) -> RandomForestRegressor:
    """The forest for one kind of answers."""
    forest = RandomForestRegressor(60, min_samples_leaf=2, max_features=0.5, random_state=0)
    answers = [getattr(each, coordinates) for each in found.values()]
    return forest.fit(np.stack([each.features for each in found.values()]), np.stack(answers))


def answers(
    forest: RandomForestRegressor, found: Mapping[Key, Detection], keys: list[Key], coordinates: Coordinates
) -> np.ndarray:
    """World boxes ``[n, 9]`` of the forest's answers."""
    boxes = forest.predict(np.stack([found[key].features for key in keys]))
    if coordinates == "camera":
        poses = np.stack([found[key].pose for key in keys])
        boxes[:, :3] = np.einsum("nij,nj->ni", poses[:, :3, :3], boxes[:, :3]) + poses[:, :3, 3]
    return np.pad(boxes, ((0, 0), (0, 3)))


def largest(found: Mapping[Key, Detection], sample_id: str) -> Key:
    """Scene, object and the frame that shows the object of a sample largest."""
    scene_id, object_id = sample_id.split("|")[:2]
    keys = [key for key in found if key[:2] == (scene_id, int(object_id))]
    return max(keys, key=lambda key: found[key].area)


def rows(root: Path, shifts: tuple[str, ...], label: str) -> list[str]:
    """Rows of the table for the shifts of a folder."""
    train, usual, lines = detections(root, "train"), detections(root, "val"), []
    # Without the pose of the camera, only a prior tells where in the world an object is.
    coordinates: Coordinates = "world" if "position_prior" in shifts else "camera"
    forest = fit(train, coordinates)
    for shift in shifts:
        cues = [cue for cue in read_cues(cues_file(root, f"val_{shift}")).values() if cue.frames]
        shifted = detections(root, f"val_{shift}")
        keys = [largest(shifted, cue.id) for cue in cues]
        base = answers(forest, usual, [largest(usual, cue.paired_id) for cue in cues], coordinates)
        near = np.linalg.norm(np.subtract(base, [cue.paired_truth for cue in cues])[:, :3], axis=1) <= 0.5
        boxes = answers(forest, shifted, keys, coordinates)
        truth, followed = [cue.truth for cue in cues], cue_boxes(cues, keys, coordinates)
        shares, nearest = (cue_shares(boxes, truth, followed, each) for each in ("centre", "nearest"))
        cells = [f"`{shift}`{label}", coordinates, f"{near.mean():.0%}", str(shares.scored), f"{shares.truth:.0%}"]
        cells += [f"{shares.cue:.0%}", f"{shares.neither:.0%}", f"{nearest.cue:.0%}", f"{shares.position:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cue_boxes(cues: list[ShortcutCue], keys: list[Key], coordinates: Coordinates) -> list[np.ndarray | None]:
    """The cues for answers from these frames."""
    if coordinates == "world":
        return [cue.world_box([frame]) for cue, (*_, frame) in zip(cues, keys, strict=True)]
    return [cue.camera_box(frame) for cue, (*_, frame) in zip(cues, keys, strict=True)]


def table(folder: Path) -> str:
    """The table, in Markdown."""
    lines = [
        "| split | answer in | `val` | scored | truth | cue | neither | nearer to the cue | position |",
        "| --- |" + " --- |" * 8,
    ]
    for name, shift in FOLDERS.items():
        write_dataset(folder / name, 0, TRAIN, VAL, SIZE, FRAMES, shift=shift)
        label = f", strength {shift.prior_strength}" if "position_prior" in shift.names else ""
        lines += rows(folder / name, shift.names, label)
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(table(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)))
