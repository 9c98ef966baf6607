"""Readers of predictions files: this project's format, and those of VG-LLM and Video-3D-LLM.

Files of other projects are joined with a prepared data set (``rescore.py``), which has the annotations.

ours        ``predictions-TASK-GEOMETRY.jsonl``. If it is joined with a data set, the question and the camera poses of
            each answer must be those of the data set.
vgllm       Sample log of lmms-eval in LaVi-Lab/VG-LLM (``src/lmms_eval/evaluator.py``, ``tasks/{scanrefer,scan2cap}``).
            A line has ``filtered_resps`` or ``resps``, and ``doc`` without images; the scene is parsed from
            ``scanrefer_score.images`` or ``scan2cap_score.images``. A ScanRefer item is identified by its scene,
            ``doc.metadata.object_id`` and ``doc.metadata.ann_id``, a Scan2Cap item by its scene and
            ``doc.annotations``, the references. Camera poses (``doc.axis_align_matrix`` x ``doc.cam2global``) and
            Scan2Cap's ``doc.iou`` replace those of the data set.
video3dllm  Answer files of LaVi-Lab/Video-3D-LLM (``llava/eval/model_{scanrefer,scan2cap,scanqa}.py``). A line has
            ``pred_response``. ScanRefer has no object id: an item is identified by the description in ``prompt`` and,
            of equal descriptions, by ``gt_response``, the annotated box. Scan2Cap's items are identified by ``scene``
            and the references in ``gt_response``, ScanQA's by ``sample_id``. That project gates captions at 0.5 when it
            writes them: an empty caption fails every k, any other passes every k. The line of an empty caption repeats
            the ``gt_response`` of the line before (``model_scan2cap.py`` sets it for other lines only), so its object
            is unknown; it counts as one without a prediction.

Every format is a pydantic model of one line (`PredictionRow`); errors name the file, the line and the field.
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
from w2r2_ds.utils.files.json_io import read_jsonl

BOX_TOLERANCE = 0.1
"""Largest difference in metres between Video-3D-LLM's and our box of one object; they come from different meshes."""
_SCENE = re.compile(r"scene\d{4}_\d{2}")
# Video-3D-LLM's sample id of a question: "scanqa_QUESTION-ID_NUMBER".
_SCANQA = re.compile(r"scanqa_(.+)_\d+")
# The description in Video-3D-LLM's prompts for ScanRefer, with or without the "gen" template's output format.
_DESCRIPTION = re.compile(r".*following description\.\n(.*?)(?:\nOutput the answer.*)?", re.DOTALL)


@dataclass
class ImportedPrediction:
    """One prediction of a file.

    Attributes:
        key: id of the item, equal to ``PredictionRow.key_of`` of its sample; None for a failure whose item is unknown.
        text: the answer; None for a missing one.
        object_box: world box ``[6]`` (centre, size; metres) of the annotated object, if the key does not identify it.
        replaced: record field -> value of the file, which replaces that of the data set.
        required: record field -> value of the file, which must be equal to that of the data set.
        location: file and line number, for messages.
    """

    key: Hashable
    text: str | None
    object_box: np.ndarray | None = None
    replaced: dict[str, Any] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    location: str = ""


class PredictionRow(FrozenModel):
    """The used fields of one line of a predictions file; one subclass per format and task.

    Attributes:
        form: coordinates of the boxes in the answers (``record.py``); None for those of the data set's questions.
    """

    form: ClassVar[Coordinates | None] = None

    @staticmethod
    @abstractmethod
    def key_of(sample: Sample) -> Hashable:
        """Key of the predictions of a sample."""

    @abstractmethod
    def prediction(self) -> ImportedPrediction:
        """The prediction of this line, without its location."""


def find_format(name: str, task: str) -> type[PredictionRow]:
    """The model of the lines of a format for a task.

    Args:
        name: ``ours``, ``vgllm`` or ``video3dllm``.
        task: name of the task.

    Raises:
        ValueError: the format has no predictions of the task.
    """
    if name == "ours":
        return OwnRow
    if (name, task) not in _FORMATS:
        known = ", ".join(other for project, other in _FORMATS if project == name)
        raise ValueError(f"Predictions of {task} in the format {name} are not supported; its tasks are {known}.")
    return _FORMATS[name, task]


def read_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Location (file and line number) and JSON object of every line. Raises ValueError as `read_jsonl`."""
    lines = read_jsonl(file, "predictions, one JSON object per line (--score_only)")
    return [(f"{file}: line {number}", values) for number, values in lines]


def read_predictions(file: Path, row: type[PredictionRow]) -> list[ImportedPrediction]:
    """Read all predictions of a file.

    Args:
        file: JSON Lines.
        row: model of its lines, from `find_format`.

    Raises:
        ValueError: a field is missing or has another type; the message names file, line and field.
    """
    adapter = TypeAdapter(row)
    predictions = []
    for location, values in read_lines(file):
        try:
            prediction = validate(adapter, values, location).prediction()
        except ValueError as error:
            raise ValueError(f"{error}\nIf the file has another format, pass it with --format.") from None
        prediction.location = location
        predictions.append(prediction)
    return predictions


def _find_scene(value: Any) -> str:
    """The first name of a ScanNet scene in a text or a list of image paths."""
    found = _SCENE.search(" ".join(map(str, value)) if isinstance(value, list) else str(value))
    if found is None:
        raise ValueError("has no name of a ScanNet scene")
    return found[0]


def _first_text(value: Any) -> str:
    """The first text in nested lists: lmms-eval writes one list per request, in ``resps`` also one per repetition."""
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError("has no text")
    return value


def _question_id(text: str) -> str:
    found = _SCANQA.fullmatch(text)
    return found[1] if found else text


def _prompt_description(prompt: str) -> str:
    found = _DESCRIPTION.fullmatch(prompt)
    if found is None:
        raise ValueError("is not Video-3D-LLM's prompt for ScanRefer")
    return found[1].strip().lower()


def _unordered(texts: Iterable[Any]) -> tuple[str, ...]:
    """Descriptions of an object as a key that does not depend on their order and case."""
    return tuple(sorted(str(text).strip().lower() for text in texts))


SceneIn = Annotated[str, BeforeValidator(_find_scene)]
VgllmText = Annotated[
    str, BeforeValidator(_first_text), Field(validation_alias=AliasChoices("filtered_resps", "resps"))
]


class OwnRow(PredictionRow):
    """This project's format, any task."""

    id: str
    text: str | None
    question: str | None = None
    cam_to_world: list[Any] | None = None

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        return sample.id

    def prediction(self) -> ImportedPrediction:
        # The frame index in an answer refers to the input frames; another preparation may have selected other frames.
        required = self.model_dump(include={"question", "cam_to_world"}, exclude_none=True)
        return ImportedPrediction(self.id, self.text, required=required)


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
        if sample.target is None:
            return sample.id  # a test split, whose objects are unknown: no line has this key
        if not sample.target.ann_id:
            raise ValueError(
                f"{sample.id} has no ann_id, which identifies the predictions of VG-LLM's files; prepare the data set "
                "from a ScanRefer file with the field 'ann_id'."
            )
        return sample.scene_id, str(sample.target.object_id), sample.target.ann_id

    def prediction(self) -> ImportedPrediction:
        # [frames, 4, 4]; the reshape is for a line without frames
        poses = np.array(self.axis_align_matrix) @ np.array(self.cam2global).reshape(-1, 4, 4)
        key = self.scene, str(self.object_id), str(self.ann_id)
        return ImportedPrediction(key, self.text, replaced={"cam_to_world": poses.tolist()})


class VgllmScan2CapRow(ObjectCaptionRow):
    """VG-LLM, Scan2Cap."""

    text: VgllmText
    scene: SceneIn = Field(validation_alias=AliasPath("scan2cap_score", "images"))
    annotations: list[Any] = Field(validation_alias=AliasPath("doc", "annotations"))
    iou: FiniteFloat = Field(validation_alias=AliasPath("doc", "iou"))

    def prediction(self) -> ImportedPrediction:
        key = self.scene, _unordered(self.annotations)
        return ImportedPrediction(key, self.text, replaced={"iou": self.iou})


class Video3dScanReferRow(PredictionRow):
    """Video-3D-LLM, ScanRefer: a text of its "gen" template, or the proposal that its grounding head selected."""

    form = "box"
    prompt: Annotated[str, AfterValidator(_prompt_description)]
    pred_response: str | Box6
    gt_response: Box6

    @staticmethod
    def key_of(sample: Sample) -> Hashable:
        begin, end = sample.what  # the description in the question
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
        return ImportedPrediction(self.prompt, text, np.array(self.gt_response), replaced={"box": box})


class Video3dScan2CapRow(ObjectCaptionRow):
    """Video-3D-LLM, Scan2Cap."""

    scene: SceneIn
    gt_response: list[Any]
    pred_response: str

    def prediction(self) -> ImportedPrediction:
        # That project writes an empty caption if the IoU is below 0.5; then gt_response is that of another object.
        if not self.pred_response.strip():
            return ImportedPrediction(None, None)
        return ImportedPrediction((self.scene, _unordered(self.gt_response)), self.pred_response, replaced={"iou": 1.0})


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
