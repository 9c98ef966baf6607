"""ScanRefer in VG-LLM's format: annotation file -> samples with prompt and answer strings.

The question asks for the first clear frame and for the object's 9-number box *in that frame's camera*; the box is the
axis-aligned world box (angles 0) moved into the camera, so its three angles depend on the camera only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from w2r2_ds.data.annotations import Description, read_scanrefer
from w2r2_ds.data.boxes import world_to_camera
from w2r2_ds.data.frames import best_frame, load_depth
from w2r2_ds.data.groups import groups, scannet_class
from w2r2_ds.data.labels import read_labels
from w2r2_ds.data.sample import Sample, Target
from w2r2_ds.data.scannet import Frame, Scene, load_scene
from w2r2_ds.data.views import uniform

QUESTION = (
    "Localize the first clear frame in the video showing the object described in the text.\n"
    "Text: {description}\n"
    'Output a JSON dictionary with the frame index in "frame" and its 3D bounding box in "bbox_3d" '
    "in the frame's coordinates.\n"
)

NO_VISIBLE_FRAME = "no_visible_frame"
INVALID_POSE = "invalid_pose_frames"


@dataclass
class _View:
    """A scene with the frames its samples see; ``best`` caches the target frame of each object."""

    scene: Scene
    frames: list[Frame]
    depths: list[np.ndarray]
    image_size: tuple[int, int]
    best: dict[int, int | None] = field(default_factory=dict)

    def best_frame(self, object_id: int) -> int | None:
        if object_id not in self.best:
            box = self.scene.instances[object_id].box
            self.best[object_id] = best_frame(
                self.frames, box, self.scene.intrinsic, self.image_size, self.scene.depth_intrinsic, self.depths
            )
        return self.best[object_id]


def question_text(description: str) -> str:
    """The text after the frames, character for character VG-LLM's (it capitalises the description)."""
    return QUESTION.format(description=description.capitalize())


def description_span(description: str) -> tuple[int, int]:
    """Characters ``[begin, end)`` of the question that are the description, without blanks around it."""
    written = description.capitalize()
    begin = len(QUESTION.partition("{description}")[0].format()) + len(written) - len(written.lstrip())
    return begin, begin + len(written.strip())


def answer_text(frame: int, box9: np.ndarray, decimals: int = 2) -> str:
    """The answer as VG-LLM writes it: fenced JSON with Python's ``repr`` of rounded numbers (``3.0``, ``0.59``).

    Args:
        frame: index among the sample's frames.
        box9: ``[9]`` box in that frame's camera (centre, size, ZXY angles; metres, radians).
        decimals: digits to round to.
    """
    numbers = [round(float(value), decimals) for value in box9]
    return f'```json\n\t{{"frame": {frame}, "bbox_3d": {numbers}}}\n```'


def build_samples(
    root: Path | str,
    annotation_file: Path | str,
    split: Literal["train", "val"],
    frame_count: int,
    decimals: int = 2,
) -> tuple[list[Sample], dict[str, int]]:
    """Turn an annotation file into samples, in the file's order.

    Every sample of a scene sees the same ``frame_count`` uniformly chosen frames. The target frame is the one that
    shows the object largest. Training samples whose object no chosen frame sees are left out; validation keeps them
    with an empty answer.

    Args:
        root: data root in ScanNet's layout, see ``data/scannet.py``.
        annotation_file: ``ScanRefer_filtered_*.json`` of this split (the unique/multiple rule counts its objects).
        split: ``"train"`` or ``"val"``.
        frame_count: frames per sample.
        decimals: digits of the numbers in the answer.

    Returns:
        the samples, and how many annotations (``no_visible_frame``) and frames (``invalid_pose_frames``) were left out.

    Raises:
        ValueError: bad data; the message names the file and what is wrong with it.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'val'")
    annotations = read_scanrefer(annotation_file)
    group_of = groups(annotations, read_labels(root), scannet_class)
    made: dict[int, Sample] = {}
    dropped = {NO_VISIBLE_FRAME: 0, INVALID_POSE: 0}
    for scene_id, numbers in _by_scene(annotations).items():
        view = _load_view(root, scene_id, frame_count)  # one scene's depth images in memory at a time
        dropped[INVALID_POSE] += view.scene.dropped_frames
        for number in numbers:
            annotation = annotations[number]
            if annotation.object_id not in view.scene.instances:
                raise ValueError(
                    f"{annotation.where}: field 'object_id' is {annotation.object_id}, which scene {scene_id} does not "
                    f"have in {scene_id}_aligned_bbox.npy; use the annotations that belong to these scans"
                )
            frame = view.best_frame(annotation.object_id)
            if frame is None and split == "train":
                dropped[NO_VISIBLE_FRAME] += 1
                continue
            group = group_of[scene_id, annotation.object_id]
            made[number] = _sample(annotation, view, frame, group, decimals)
    return [made[number] for number in sorted(made)], dropped


def _by_scene(annotations: list[Description]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, annotation in enumerate(annotations):
        numbers.setdefault(annotation.scene_id, []).append(number)
    return numbers


def _load_view(root: Path | str, scene_id: str, frame_count: int) -> _View:
    scene = load_scene(root, scene_id)
    frames = [scene.frames[i] for i in uniform(len(scene.frames), frame_count)]
    try:
        with Image.open(frames[0].color) as image:
            size = image.size
    except OSError as error:
        raise ValueError(f"{frames[0].color} is not a readable image; extract it again ({error})") from None
    return _View(scene, frames, [load_depth(frame) for frame in frames], size)


def _sample(annotation: Description, view: _View, frame: int | None, group: str, decimals: int) -> Sample:
    box = np.concatenate([view.scene.instances[annotation.object_id].box, np.zeros(3)])
    answer = ""
    if frame is not None:
        answer = answer_text(frame, world_to_camera(box, view.frames[frame].cam_to_world), decimals)
    return Sample(
        id=annotation.key,
        task="scanrefer",
        scene_id=annotation.scene_id,
        frames=tuple(f.color for f in view.frames),
        cam_to_world=np.stack([f.cam_to_world for f in view.frames]),
        question=question_text(annotation.text),
        answer=answer,
        target=Target(box, annotation.object_id, annotation.object_name.replace("_", " "), group),
        what=description_span(annotation.text),
    )
