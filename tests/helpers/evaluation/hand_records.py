"""Hand-made samples of each task, without images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from w2r2_ds.boxes3d.transforms import world_to_camera
from w2r2_ds.types.sample import LabeledBox, Reference, Sample, Target

ROOT = Path("/nowhere")
LEVEL = np.array([[1, 0, 0, 1], [0, 0, 1, 2], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])
TURNED = np.array([[0.8, 0, -0.6, 1], [0.6, 0, 0.8, 2], [0, -1, 0, 1.5], [0, 0, 0, 1.0]])
BOX = np.array([2, 5, 1, 0.8, 0.6, 1, 0, 0, 0.0])
WORLD_QUESTION = (
    "Localize the object according to the following description.\n{}\n"
    "Output the answer in the format x_min,y_min,z_min,x_max,y_max,z_max"
)


def beside(shift: float) -> np.ndarray:
    """``BOX`` moved along x by `shift` metres."""
    moved = BOX.copy()
    moved[0] += shift
    return moved


def grounding(ann: str = "0", number: int = 3, scene: str = "scene0011_00", **target: Any) -> Sample:
    """A ScanRefer sample. Its groups and class are given, as they would be computed from a whole split."""
    text = f"The chair, number {number}."
    fields = {"group": "unique", "group_nyu40": "multiple", "scannet_class": 2, "ann_id": ann, **target}
    return Sample(
        id=f"{scene}|{number}|office_chair|{ann}",
        task="scanrefer",
        scene_id=scene,
        frames=(ROOT / "a.jpg", ROOT / "b.jpg"),
        cam_to_world=np.stack([LEVEL, TURNED]),
        question=f"Localize it.\nText: {text}\n",
        answer="",
        target=Target(BOX, number, "office chair", **fields),
        what=(len("Localize it.\nText: "), len("Localize it.\nText: ") + len(text)),
    )


def camera_answer(sample: Sample, frame: int = 0, box: np.ndarray | None = None, decimals: int = 6) -> str:
    """An answer in VG-LLM's format, with a world box in the coordinates of camera `frame`."""
    moved = world_to_camera(BOX if box is None else box, sample.cam_to_world[frame])
    return json.dumps({"frame": frame, "bbox_3d": [round(float(value), decimals) for value in moved]})


def in_world(sample: Sample) -> Sample:
    """The same sample with Video-3D-LLM's prompt, which asks for a box in world coordinates."""
    text = sample.question[sample.what[0] : sample.what[1]]
    begin = WORLD_QUESTION.index("{}")
    return replace(sample, question=WORLD_QUESTION.format(text), what=(begin, begin + len(text)), box_format="world")


def caption(number: int = 3, described: np.ndarray | None = BOX[:6], scene: str = "scene0011_00") -> Sample:
    """A Scan2Cap sample with two reference captions."""
    references = (
        Reference(f"The chair {number} is black.", ("the", "chair", str(number), "is", "black", ".")),
        Reference(f"A black chair {number}, by the desk.", ("a", "black", "chair", str(number), ",", "by", "the")),
    )
    return replace(
        grounding("", number, scene),
        id=f"{scene}|{number}|office_chair",
        task="scan2cap",
        kind="caption",
        target=Target(BOX, number, "office chair", "unique", described=described),
        references=references,
    )


def question(number: int = 0, answers: tuple[str, ...] = ("brown", "dark brown")) -> Sample:
    """A ScanQA sample with its reference answers."""
    return replace(
        grounding(),
        id=f"val-scene0011-{number}",
        task="scanqa",
        kind="answer",
        target=None,
        references=tuple(Reference(text) for text in answers),
    )


def detection() -> Sample:
    """A detection sample with two objects."""
    objects = (LabeledBox("chair", BOX), LabeledBox("desk", beside(5)))
    return replace(grounding(), id="scene0011_00|00010", task="detection", target=None, kind="answer", objects=objects)
