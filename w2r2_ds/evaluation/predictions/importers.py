"""Readers of predictions files: this project's, and those of VG-LLM and Video-3D-LLM joined with a prepared data set.

ours        ``predictions-TASK-GEOMETRY.jsonl``. If it is joined with a data set, the question and the camera poses of
            each answer must be those of the data set.
vgllm       lmms-eval's sample log of LaVi-Lab/VG-LLM (``src/lmms_eval/evaluator.py``, ``tasks/{scanrefer,scan2cap}``):
            a line has ``filtered_resps`` or ``resps``, and ``doc`` without images; the scene is parsed from
            ``scanrefer_score.images`` or ``scan2cap_score.images``. Items are identified by scene,
            ``doc.metadata.object_id`` and ``ann_id``. Camera poses are the file's, ``doc.axis_align_matrix`` x
            ``doc.cam2global``, and so is Scan2Cap's ``doc.iou``.
video3dllm  the answer files of LaVi-Lab/Video-3D-LLM (``llava/eval/model_{scanrefer,scan2cap,scanqa}.py``): a line has
            ``sample_id`` and ``pred_response``. ScanRefer's has no object id: an item is identified by the description
            in ``prompt`` and, among equal ones, by ``gt_response``, the box. Scan2Cap's is identified by ``scene`` and
            its references, ``gt_response``; captions were gated at 0.5 by that project, so an empty one fails every k
            and any other passes every k.

Every format is a pydantic row: errors name the file, the line and the field.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, TypeAdapter, model_validator

from w2r2_ds.data.sources.validation import Record as Row
from w2r2_ds.data.sources.validation import validate
from w2r2_ds.data.tasks.parsing import AnswerError, parse_world_box
from w2r2_ds.evaluation.protocols.records import Box6, Pose
from w2r2_ds.types.sample import Sample
from w2r2_ds.utils.json_io import read_jsonl

BOX_TOLERANCE = 0.1
"""Metres between a box of Video-3D-LLM and ours of the same object: the two are computed from different meshes."""
_SCENE = re.compile(r"scene\d{4}_\d{2}")
_SCANQA = re.compile(r"scanqa_(.+)_\d+")
_DESCRIPTION = re.compile(r".*following description\.\n(.*?)(?:\nOutput the answer.*)?", re.DOTALL)


@dataclass
class ImportedPrediction:
    """One prediction of a file.

    Attributes:
        key: identifies the item; equal to ``PredictionFormat.key`` of its sample.
        text: the answer; None without one.
        near: ``[6]`` box of its object, if the key does not identify the object.
        changes: fields of the record that are replaced by the file's.
        asked: fields of the record that the file has too and that must be equal.
        where: file and line number, for messages.
    """

    key: Hashable
    text: str | None
    near: np.ndarray | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    where: str = ""


class PredictionRow(Row):
    """The fields of one line that are used."""

    @abstractmethod
    def prediction(self) -> ImportedPrediction:
        """The prediction without `where`."""


@dataclass(frozen=True)
class PredictionFormat:
    """One kind of file.

    Attributes:
        key: sample -> key of its predictions.
        row: model of a line.
        form: coordinates of all answers (``record.py``), if they are not those that the data set's questions ask for.
    """

    key: Callable[[Sample], Hashable]
    row: type[PredictionRow]
    form: str | None = None


def find_format(name: str, task: str) -> PredictionFormat:
    """The format of a project's predictions for a task.

    Raises:
        ValueError: there is none.
    """
    if name == "ours":
        return PredictionFormat(lambda sample: sample.id, OwnRow)
    if (name, task) not in _FORMATS:
        known = ", ".join(other for project, other in _FORMATS if project == name)
        raise ValueError(f"Predictions of {task} in the format {name} are not supported; it has {known}.")
    return _FORMATS[name, task]


def read_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """File and line number, and JSON object, of every line. Raises ValueError as ``read_jsonl``."""
    lines = read_jsonl(file, "predictions, one JSON object per line (--score_only)")
    return [(f"{file}: line {number}", values) for number, values in lines]


def read_predictions(file: Path, prediction_format: PredictionFormat) -> list[ImportedPrediction]:
    """All predictions of a file.

    Raises:
        ValueError: a line lacks a field or has another type (names file, line and field).
    """
    adapter = TypeAdapter(prediction_format.row)
    predictions = []
    for where, values in read_lines(file):
        try:
            prediction = validate(adapter, values, where).prediction()
        except ValueError as error:
            raise ValueError(f"{error}\nIf the file has another format, name it with --format.") from None
        prediction.where = where
        predictions.append(prediction)
    return predictions


class OwnRow(PredictionRow):
    """This project's records."""

    id: str
    text: str | None
    question: str | None = None
    cam_to_world: list[Any] | None = None

    def prediction(self) -> ImportedPrediction:
        # A frame index is only meaningful for the frames that the model got, an answer only for its question.
        asked = {name: getattr(self, name) for name in ("question", "cam_to_world") if getattr(self, name) is not None}
        return ImportedPrediction(self.id, self.text, asked=asked)


def _find_scene(value: Any) -> str:
    found = _SCENE.search(" ".join(map(str, value)) if isinstance(value, list) else str(value))
    if found is None:
        raise ValueError("has no name of a ScanNet scene")
    return found[0]


def _first_text(value: Any) -> str:
    """lmms-eval writes one list per request, in ``resps`` also one per repetition; the first text is the answer."""
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError("has no text")
    return value


def _question_id(text: str) -> str:
    found = _SCANQA.fullmatch(text)
    return found[1] if found else text


def _asked_description(prompt: str) -> str:
    found = _DESCRIPTION.fullmatch(prompt)
    if found is None:
        raise ValueError("is not Video-3D-LLM's prompt for ScanRefer")
    return found[1].strip().lower()


def _unordered(texts: Iterable[Any]) -> tuple[str, ...]:
    """Descriptions of an object, independent of their order."""
    return tuple(sorted(str(text).strip().lower() for text in texts))


SceneIn = Annotated[str, BeforeValidator(_find_scene)]
FirstText = Annotated[str, BeforeValidator(_first_text)]


class VgllmRow(PredictionRow):
    """A line of lmms-eval's log."""

    filtered_resps: FirstText | None = None
    resps: FirstText | None = None

    @model_validator(mode="after")
    def _has_answer(self) -> VgllmRow:
        if self.filtered_resps is None and self.resps is None:
            raise ValueError("needs the field 'filtered_resps' or 'resps'")
        return self

    @property
    def text(self) -> str | None:
        """The generated answer."""
        return self.resps if self.filtered_resps is None else self.filtered_resps


class VgllmScore(Row):
    """lmms-eval's log of a score function; only the names of the images are used."""

    scene: SceneIn = Field(validation_alias="images")


class VgllmObject(Row):
    """``doc.metadata`` of VG-LLM's ScanRefer."""

    object_id: str | int
    ann_id: str | int


class VgllmScanReferDoc(Row):
    """``doc`` of VG-LLM's ScanRefer."""

    metadata: VgllmObject
    axis_align_matrix: Pose
    cam2global: list[Pose]


class VgllmScanReferRow(VgllmRow):
    """VG-LLM, ScanRefer."""

    doc: VgllmScanReferDoc
    scanrefer_score: VgllmScore

    def prediction(self) -> ImportedPrediction:
        about = self.doc.metadata
        poses = np.array(self.doc.axis_align_matrix) @ np.array(self.doc.cam2global).reshape(-1, 4, 4)
        return ImportedPrediction(
            (self.scanrefer_score.scene, str(about.object_id), str(about.ann_id)),
            self.text,
            changes={"form": "camera", "cam_to_world": poses.tolist()},
        )


class VgllmScan2CapDoc(Row):
    """``doc`` of VG-LLM's Scan2Cap."""

    annotations: list[Any]
    iou: FiniteFloat


class VgllmScan2CapRow(VgllmRow):
    """VG-LLM, Scan2Cap."""

    doc: VgllmScan2CapDoc
    scan2cap_score: VgllmScore

    def prediction(self) -> ImportedPrediction:
        key = self.scan2cap_score.scene, _unordered(self.doc.annotations)
        return ImportedPrediction(key, self.text, changes={"iou": self.doc.iou})


class Video3dScanReferRow(PredictionRow):
    """Video-3D-LLM, ScanRefer: a text of its "gen" template, or the box that its grounding head chose."""

    prompt: Annotated[str, AfterValidator(_asked_description)]
    pred_response: str | Box6
    gt_response: Box6

    def prediction(self) -> ImportedPrediction:
        box: list[float] | None
        if isinstance(self.pred_response, str):
            text = self.pred_response
            try:
                box = parse_world_box(text).tolist()
            except AnswerError:
                box = None
        else:
            box, text = self.pred_response, json.dumps(self.pred_response)
        return ImportedPrediction(self.prompt, text, np.array(self.gt_response), {"form": "box", "box": box})


class Video3dScan2CapRow(PredictionRow):
    """Video-3D-LLM, Scan2Cap."""

    scene: SceneIn
    gt_response: list[Any]
    pred_response: str

    def prediction(self) -> ImportedPrediction:
        key = self.scene, _unordered(self.gt_response)
        return ImportedPrediction(key, self.pred_response, changes={"iou": float(bool(self.pred_response))})


class Video3dScanQaRow(PredictionRow):
    """Video-3D-LLM, ScanQA."""

    sample_id: str
    pred_response: str

    def prediction(self) -> ImportedPrediction:
        return ImportedPrediction(_question_id(self.sample_id), self.pred_response)


def _object_key(sample: Sample) -> Hashable:
    assert sample.target is not None, "samples of ScanRefer have a target"
    return sample.scene_id, str(sample.target.object_id), sample.target.ann_id


def _references_key(sample: Sample) -> Hashable:
    return sample.scene_id, _unordered(reference.text for reference in sample.references)


def _description_key(sample: Sample) -> Hashable:
    begin, end = sample.what
    return sample.question[begin:end].strip().lower()


def _question_key(sample: Sample) -> Hashable:
    return _question_id(sample.id)


_FORMATS = {
    ("vgllm", "scanrefer"): PredictionFormat(_object_key, VgllmScanReferRow, "camera"),
    ("vgllm", "scan2cap"): PredictionFormat(_references_key, VgllmScan2CapRow),
    ("video3dllm", "scanrefer"): PredictionFormat(_description_key, Video3dScanReferRow, "box"),
    ("video3dllm", "scan2cap"): PredictionFormat(_references_key, Video3dScan2CapRow),
    ("video3dllm", "scanqa"): PredictionFormat(_question_key, Video3dScanQaRow),
}
