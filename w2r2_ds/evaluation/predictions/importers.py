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

Every format is a pydantic model of one line (``PredictionRow``): errors name the file, the line and the field.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, AliasChoices, AliasPath, BeforeValidator, Field, FiniteFloat, TypeAdapter

from w2r2_ds.data.sources.validation import FrozenModel, validate
from w2r2_ds.data.tasks.parsing import AnswerError, parse_world_box
from w2r2_ds.evaluation.protocols.records import Box6, Coordinates, Pose
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
        key: identifies the item; equal to ``PredictionRow.key_of`` of its sample.
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


class PredictionRow(FrozenModel):
    """The fields of one line that are used; a subclass per format.

    Attributes:
        form: coordinates of all answers (``record.py``), if they are not those that the data set's questions ask for.
    """

    form: ClassVar[Coordinates | None] = None

    @staticmethod
    @abstractmethod
    def key_of(sample: Sample) -> Hashable:
        """The key of a sample's predictions."""

    @abstractmethod
    def prediction(self) -> ImportedPrediction:
        """The prediction without `where`."""


def find_format(name: str, task: str) -> type[PredictionRow]:
    """The model of a line of a project's predictions for a task.

    Raises:
        ValueError: there is none.
    """
    if name == "ours":
        return OwnRow
    if (name, task) not in _FORMATS:
        known = ", ".join(other for project, other in _FORMATS if project == name)
        raise ValueError(f"Predictions of {task} in the format {name} are not supported; it has {known}.")
    return _FORMATS[name, task]


def read_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """File and line number, and JSON object, of every line. Raises ValueError as ``read_jsonl``."""
    lines = read_jsonl(file, "predictions, one JSON object per line (--score_only)")
    return [(f"{file}: line {number}", values) for number, values in lines]


def read_predictions(file: Path, row: type[PredictionRow]) -> list[ImportedPrediction]:
    """All predictions of a file.

    Raises:
        ValueError: a line lacks a field or has another type (names file, line and field).
    """
    adapter = TypeAdapter(row)
    predictions = []
    for where, values in read_lines(file):
        try:
            prediction = validate(adapter, values, where).prediction()
        except ValueError as error:
            raise ValueError(f"{error}\nIf the file has another format, name it with --format.") from None
        prediction.where = where
        predictions.append(prediction)
    return predictions


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
VgllmText = Annotated[
    str, BeforeValidator(_first_text), Field(validation_alias=AliasChoices("filtered_resps", "resps"))
]


class OwnRow(PredictionRow):
    """This project's records."""

    id: str
    text: str | None
    question: str | None = None
    cam_to_world: list[Any] | None = None

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        return sample.id

    def prediction(self) -> ImportedPrediction:
        # A frame index is only meaningful for the frames that the model got, an answer only for its question.
        asked = self.model_dump(include={"question", "cam_to_world"}, exclude_none=True)
        return ImportedPrediction(self.id, self.text, asked=asked)


class ObjectCaptionRow(PredictionRow):
    """Base of the Scan2Cap formats: an object is identified by its scene and its references."""

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        return sample.scene_id, _unordered(reference.text for reference in sample.references)


class VgllmScanReferRow(PredictionRow):
    """VG-LLM, ScanRefer."""

    form = "camera"
    text: VgllmText
    scene: SceneIn = Field(validation_alias=AliasPath("scanrefer_score", "images"))
    object_id: str | int = Field(validation_alias=AliasPath("doc", "metadata", "object_id"))
    ann_id: str | int = Field(validation_alias=AliasPath("doc", "metadata", "ann_id"))
    axis_align_matrix: Pose = Field(validation_alias=AliasPath("doc", "axis_align_matrix"))
    cam2global: list[Pose] = Field(validation_alias=AliasPath("doc", "cam2global"))

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        assert sample.target is not None, "samples of ScanRefer have a target"
        return sample.scene_id, str(sample.target.object_id), sample.target.ann_id

    def prediction(self) -> ImportedPrediction:
        poses = np.array(self.axis_align_matrix) @ np.array(self.cam2global).reshape(-1, 4, 4)
        key = self.scene, str(self.object_id), str(self.ann_id)
        return ImportedPrediction(key, self.text, changes={"cam_to_world": poses.tolist()})


class VgllmScan2CapRow(ObjectCaptionRow):
    """VG-LLM, Scan2Cap."""

    text: VgllmText
    scene: SceneIn = Field(validation_alias=AliasPath("scan2cap_score", "images"))
    annotations: list[Any] = Field(validation_alias=AliasPath("doc", "annotations"))
    iou: FiniteFloat = Field(validation_alias=AliasPath("doc", "iou"))

    def prediction(self) -> ImportedPrediction:
        return ImportedPrediction((self.scene, _unordered(self.annotations)), self.text, changes={"iou": self.iou})


class Video3dScanReferRow(PredictionRow):
    """Video-3D-LLM, ScanRefer: a text of its "gen" template, or the box that its grounding head chose."""

    form = "box"
    prompt: Annotated[str, AfterValidator(_asked_description)]
    pred_response: str | Box6
    gt_response: Box6

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        begin, end = sample.what
        return sample.question[begin:end].strip().lower()

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
        return ImportedPrediction(self.prompt, text, np.array(self.gt_response), {"box": box})


class Video3dScan2CapRow(ObjectCaptionRow):
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

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        return _question_id(sample.id)

    def prediction(self) -> ImportedPrediction:
        return ImportedPrediction(_question_id(self.sample_id), self.pred_response)


_FORMATS: dict[tuple[str, str], type[PredictionRow]] = {
    ("vgllm", "scanrefer"): VgllmScanReferRow,
    ("vgllm", "scan2cap"): VgllmScan2CapRow,
    ("video3dllm", "scanrefer"): Video3dScanReferRow,
    ("video3dllm", "scan2cap"): Video3dScan2CapRow,
    ("video3dllm", "scanqa"): Video3dScanQaRow,
}
