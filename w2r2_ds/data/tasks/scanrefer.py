"""ScanRefer in VG-LLM's format: annotation file -> samples with prompt and answer strings.

The question asks for the first clear frame and for the object's 9-number box *in that frame's camera*; the box is the
axis-aligned world box (angles 0) moved into the camera, so its three angles depend on the camera only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from w2r2_ds.data.boxes import world_to_camera
from w2r2_ds.data.frames import best_frame, load_depth
from w2r2_ds.data.sample import Sample, Target
from w2r2_ds.data.scannet import Frame, Scene, check_scene_id, load_labels, load_scene
from w2r2_ds.data.views import uniform

QUESTION = (
    "Localize the first clear frame in the video showing the object described in the text.\n"
    "Text: {description}\n"
    'Output a JSON dictionary with the frame index in "frame" and its 3D bounding box in "bbox_3d" '
    "in the frame's coordinates.\n"
)

# The 17 named classes of ScanNet's detection benchmark as ScanRefer spells them; NYU40's own "refridgerator" is not
# among them, so refrigerators count as "others" there, and here.
SCANNET_CLASSES = (
    *("cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk"),
    *("curtain", "refrigerator", "shower curtain", "toilet", "sink", "bathtub"),
)
NO_VISIBLE_FRAME = "no_visible_frame"
INVALID_POSE = "invalid_pose_frames"


@dataclass(frozen=True)
class Annotation:
    """One entry of a ScanRefer file; ``object_name`` is spelt as in the file, with underscores."""

    scene_id: str
    object_id: int
    object_name: str
    ann_id: str
    description: str


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


def load_annotations(file: Path | str) -> list[Annotation]:
    """Read and check a ``ScanRefer_filtered_*.json``.

    Raises:
        ValueError: the file is missing or not a JSON list, or an entry lacks a usable field; the message names the
            file, the entry's number (from 0) and the field.
    """
    path = Path(file)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; ask for ScanRefer's annotations or correct the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON; copy it again ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a JSON list of annotations, not {type(entries).__name__}")
    annotations = [_annotation(entry, f"{path}: entry {number}") for number, entry in enumerate(entries)]
    seen: dict[str, int] = {}
    for number, annotation in enumerate(annotations):
        first = seen.setdefault(_sample_id(annotation), number)
        if first != number:
            raise ValueError(f"{path}: entry {number} repeats the scene, object and ann_id of entry {first}")
    return annotations


def _annotation(entry: Any, where: str) -> Annotation:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a JSON object with scene_id, object_id, ...; remove or correct it")
    for name in ("scene_id", "object_id", "object_name", "ann_id", "description"):
        value = entry.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and name in ("object_id", "ann_id")
        if not whole and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{where}: field {name!r} is missing or empty or no string; remove or correct the entry")
    tokens = entry.get("token", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{where}: field 'token' must be a list of strings; remove or correct the field")
    if not str(entry["object_id"]).isdecimal():
        raise ValueError(f"{where}: field 'object_id' is {entry['object_id']!r}, not a number; correct the entry")
    try:
        check_scene_id(entry["scene_id"])
    except ValueError as error:
        raise ValueError(f"{where}: field 'scene_id': {error}") from None
    return Annotation(
        entry["scene_id"], int(entry["object_id"]), entry["object_name"], str(entry["ann_id"]), entry["description"]
    )


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


def object_groups(annotations: Iterable[Annotation], labels: dict[str, str]) -> dict[tuple[str, int], str]:
    """``"unique"`` or ``"multiple"`` per (scene, object), by the original ScanRefer rule.

    A name is mapped to ScanNet's 18 classes (through the raw category's NYU40 class; anything else is "others"); an
    object is multiple if more than one distinct *annotated* object of its scene has its class.

    Args:
        annotations: all annotations of one split.
        labels: raw category to NYU40 class, ``load_labels``.
    """
    classes: dict[str, dict[int, str]] = {}
    for annotation in annotations:
        name = labels.get(annotation.object_name.replace("_", " "), "others")
        # as in ScanRefer, the first annotation of an object decides its class
        objects = classes.setdefault(annotation.scene_id, {})
        objects.setdefault(annotation.object_id, name if name in SCANNET_CLASSES else "others")
    return {
        (scene_id, object_id): "multiple" if list(objects.values()).count(name) > 1 else "unique"
        for scene_id, objects in classes.items()
        for object_id, name in objects.items()
    }


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
    annotations = load_annotations(annotation_file)
    groups = object_groups(annotations, load_labels(root))
    made: dict[int, Sample] = {}
    dropped = {NO_VISIBLE_FRAME: 0, INVALID_POSE: 0}
    for scene_id, numbers in _by_scene(annotations).items():
        view = _load_view(root, scene_id, frame_count)  # one scene's depth images in memory at a time
        dropped[INVALID_POSE] += view.scene.dropped_frames
        for number in numbers:
            annotation = annotations[number]
            if annotation.object_id not in view.scene.instances:
                raise ValueError(
                    f"{annotation_file}: entry {number} names object_id {annotation.object_id}, which scene {scene_id} "
                    f"does not have in {scene_id}_aligned_bbox.npy; use the annotations that belong to these scans"
                )
            frame = view.best_frame(annotation.object_id)
            if frame is None and split == "train":
                dropped[NO_VISIBLE_FRAME] += 1
                continue
            group = groups[scene_id, annotation.object_id]
            made[number] = _sample(annotation, view, frame, group, decimals)
    return [made[number] for number in sorted(made)], dropped


def _by_scene(annotations: list[Annotation]) -> dict[str, list[int]]:
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


def _sample_id(annotation: Annotation) -> str:
    return f"{annotation.scene_id}|{annotation.object_id}|{annotation.object_name}|{annotation.ann_id}"


def _sample(annotation: Annotation, view: _View, frame: int | None, group: str, decimals: int) -> Sample:
    box = np.concatenate([view.scene.instances[annotation.object_id].box, np.zeros(3)])
    answer = ""
    if frame is not None:
        answer = answer_text(frame, world_to_camera(box, view.frames[frame].cam_to_world), decimals)
    return Sample(
        id=_sample_id(annotation),
        task="scanrefer",
        scene_id=annotation.scene_id,
        frames=tuple(f.color for f in view.frames),
        cam_to_world=np.stack([f.cam_to_world for f in view.frames]),
        question=question_text(annotation.description),
        answer=answer,
        target=Target(box, annotation.object_id, annotation.object_name.replace("_", " "), group),
        what=description_span(annotation.description),
    )
