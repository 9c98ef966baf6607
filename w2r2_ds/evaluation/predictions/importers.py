"""Predictions in files, of this project or another, to the records that ``score.py`` scores; no model.

ours        ``predictions-TASK-GEOMETRY.jsonl``: complete in itself. With a data set, its items count, not the file's;
            an answer to another question or to other frames than the data set's is refused.
vgllm       lmms-eval's sample log of LaVi-Lab/VG-LLM (``src/lmms_eval/evaluator.py``, ``tasks/{scanrefer,scan2cap}``):
            a line has ``filtered_resps`` or ``resps``, and ``doc`` without images; the scene is read from
            ``scanrefer_score.images`` or ``scan2cap_score.images``. Items are told by scene, ``doc.metadata.object_id``
            and ``ann_id``; the frames' poses are the file's, ``doc.axis_align_matrix`` x ``doc.cam2global``, and so is
            Scan2Cap's ``doc.iou``.
video3dllm  the answer files of LaVi-Lab/Video-3D-LLM (``llava/eval/model_{scanrefer,scan2cap,scanqa}.py``): a line has
            ``sample_id`` and ``pred_response``. ScanRefer's names no object: an item is told by the description in
            ``prompt`` and, of equal ones, by ``gt_response``, the box. Scan2Cap's is told by ``scene`` and its
            references, ``gt_response``; an empty caption failed the gate at 0.5 already, any other passes every k.

Items without a prediction count as failures, predictions of no item are left out; both are counted in the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from w2r2_ds.data.tasks.parsing import AnswerError, parse_world_box
from w2r2_ds.evaluation.predictions.jsonl import Line
from w2r2_ds.types.sample import Sample

NEAR = 0.1
"""Metres by which a box of Video-3D-LLM may differ from ours and be the same object's: its mesh is another."""
_SCENE = re.compile(r"scene\d{4}_\d{2}")
_SCANQA = re.compile(r"scanqa_(.+)_\d+")
_DESCRIPTION = re.compile(r".*following description\.\n(.*?)(?:\nOutput the answer.*)?", re.DOTALL)


@dataclass
class Foreign:
    """One prediction of a file.

    Attributes:
        line: where it stands.
        key: what it predicts, as its `Format` says.
        text: the answer; None where the line says that there is none.
        near: ``[6]`` box of its object, where the key does not tell objects apart; None where it does.
        changes: fields of the record that are the file's.
        asked: fields of the record that the file has and that must be the data set's.
    """

    line: Line
    key: Hashable
    text: str | None
    near: np.ndarray | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How one kind of file says what it predicts.

    Attributes:
        key: of a sample.
        read: a line, with the same key.
        form: of all records (``record.py``), where the file's answers have another than the data set asks for.
    """

    key: Callable[[Sample], Hashable]
    read: Callable[[Line], Foreign]
    form: str | None = None


def find_format(name: str, task: str) -> Format:
    """The format of a project for a task.

    Raises:
        ValueError: that project's files have no such task.
    """
    if name == "ours":
        return Format(lambda sample: sample.id, _ours)
    if (name, task) not in _FORMATS:
        known = ", ".join(other for project, other in _FORMATS if project == name)
        raise ValueError(f"Predictions of {task} in the format {name} are not read; it has {known}.")
    return _FORMATS[name, task]


def _ours(line: Line) -> Foreign:
    # A frame index means nothing among other frames, a caption nothing of another place.
    asked = {name: line.values[name] for name in ("question", "cam_to_world") if name in line.values}
    return Foreign(line, line.get("id", str), line.get("text", (str, type(None))), asked=asked)


def _object_key(sample: Sample) -> Hashable:
    assert sample.target is not None, "it is about an object"
    return sample.scene_id, str(sample.target.object_id), sample.target.ann_id


def _references_key(sample: Sample) -> Hashable:
    return sample.scene_id, _texts(reference.text for reference in sample.references)


def _description_key(sample: Sample) -> Hashable:
    begin, end = sample.what
    return sample.question[begin:end].strip().lower()


def _question_key(sample: Sample) -> Hashable:
    return _question_id(sample.id)


def _question_id(text: str) -> str:
    found = _SCANQA.fullmatch(text)
    return found[1] if found else text


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Descriptions of an object, whatever their order."""
    return tuple(sorted(text.strip().lower() for text in texts))


def _vgllm_text(line: Line) -> str:
    """The first answer; lmms-eval keeps one list per request, and one per repetition in ``resps``."""
    name = "filtered_resps" if "filtered_resps" in line.values else "resps"
    value: Any = line.get(name, list)
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{line.where}: field {name!r} holds no text.")
    return value


def _vgllm_scene(line: Line, name: str) -> str:
    found = _SCENE.search(" ".join(map(str, line.get(name, list))))
    if found is None:
        raise ValueError(f"{line.where}: field {name!r} holds no file of a ScanNet scene.")
    return found[0]


def _vgllm_scanrefer(line: Line) -> Foreign:
    scene = _vgllm_scene(line, "scanrefer_score.images")
    identity, ann = (str(line.get(f"doc.metadata.{name}", (str, int))) for name in ("object_id", "ann_id"))
    poses = line.numbers("doc.axis_align_matrix", (4, 4)) @ line.numbers("doc.cam2global", (-1, 4, 4))
    changes = {"form": "camera", "cam_to_world": poses.tolist()}
    return Foreign(line, (scene, identity, ann), _vgllm_text(line), changes=changes)


def _vgllm_scan2cap(line: Line) -> Foreign:
    scene = _vgllm_scene(line, "scan2cap_score.images")
    key = scene, _texts(map(str, line.get("doc.annotations", list)))
    return Foreign(line, key, _vgllm_text(line), changes={"iou": float(line.get("doc.iou", (int, float)))})


def _video3dllm_scanrefer(line: Line) -> Foreign:
    found = _DESCRIPTION.fullmatch(line.get("prompt", str))
    if found is None:
        raise ValueError(f"{line.where}: field 'prompt' is not Video-3D-LLM's for ScanRefer.")
    if isinstance(line.get("pred_response", (str, list)), str):  # the "gen" template
        text = line.get("pred_response", str)
        try:
            box: list[float] | None = parse_world_box(text).tolist()
        except AnswerError:
            box = None
    else:
        box = line.numbers("pred_response", (6,)).tolist()
        text = json.dumps(box)
    truth = line.numbers("gt_response", (6,))
    return Foreign(line, found[1].strip().lower(), text, truth, {"form": "box", "box": box})


def _video3dllm_scan2cap(line: Line) -> Foreign:
    found = _SCENE.search(line.get("scene", str))
    if found is None:
        raise ValueError(f"{line.where}: field 'scene' holds no ScanNet scene.")
    key = found[0], _texts(map(str, line.get("gt_response", list)))
    text = line.get("pred_response", str)
    return Foreign(line, key, text, changes={"iou": float(bool(text))})


def _video3dllm_scanqa(line: Line) -> Foreign:
    return Foreign(line, _question_id(line.get("sample_id", str)), line.get("pred_response", str))


_FORMATS = {
    ("vgllm", "scanrefer"): Format(_object_key, _vgllm_scanrefer, "camera"),
    ("vgllm", "scan2cap"): Format(_references_key, _vgllm_scan2cap),
    ("video3dllm", "scanrefer"): Format(_description_key, _video3dllm_scanrefer, "box"),
    ("video3dllm", "scan2cap"): Format(_references_key, _video3dllm_scan2cap),
    ("video3dllm", "scanqa"): Format(_question_key, _video3dllm_scanqa),
}
