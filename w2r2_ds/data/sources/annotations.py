"""Readers of the annotation files of ScanRefer and ScanQA.

``ScanRefer_filtered_{train,val}.json`` (Scan2Cap's annotations too)::

    [{"scene_id": "scene0000_00", "object_id": "39", "object_name": "office_chair", "ann_id": "0",
      "description": "...", "token": ["the", ...]}, ...]

``ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json``, the last two without answers, the last without objects::

    [{"scene_id": "scene0000_00", "question_id": "train-scene0000-0", "question": "...", "answers": ["brown", ...],
      "object_ids": [8], "object_names": ["table"]}, ...]
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from w2r2_ds.data.sources.validation import (
    FrozenModel,
    Name,
    Number,
    SceneId,
    Text,
    number_or_digits,
    raise_problems,
    validate,
)
from w2r2_ds.utils.json_io import read_json

SCANREFER = "ScanRefer's annotations, which its authors send on request"
SCANQA = "ScanQA's annotations, from its public download"


class Description(FrozenModel):
    """A sentence about one object.

    Attributes:
        scene_id: ScanNet scene name.
        object_id: instance id in the scene.
        object_name: as in the file, with underscores for blanks.
        ann_id: number of this description of the object, as in the file.
        text: the sentence.
        words: the sentence as the file tokenises it (field ``token``); words may be empty strings.
        location: file and entry, for messages.
    """

    scene_id: SceneId
    object_id: Number
    object_name: Name
    ann_id: Annotated[str, BeforeValidator(lambda value: str(number_or_digits(value)))]
    text: Text = Field(alias="description")
    words: tuple[str, ...] = Field(alias="token", min_length=1)
    location: str = ""

    object_field: ClassVar[str] = "object_id"

    @property
    def key(self) -> str:
        """Unique in a file: ``"scene0000_00|39|office_chair|0"``."""
        return f"{self.scene_id}|{self.object_id}|{self.object_name}|{self.ann_id}"

    @property
    def object_ids(self) -> tuple[int, ...]:
        """The one object."""
        return (self.object_id,)


class Question(FrozenModel):
    """A question about a scene.

    Attributes:
        scene_id: ScanNet scene name.
        question_id: unique in a file.
        text: the question.
        answers: all reference answers; empty in ScanQA's test splits.
        object_ids: instances that the question is about; empty in ScanQA's test split without objects.
        object_names: their names.
        location: file and entry, for messages.
    """

    scene_id: SceneId
    question_id: Name
    text: Text = Field(alias="question")
    answers: tuple[Text, ...] = Field((), min_length=1)
    object_ids: tuple[Number, ...] = ()
    object_names: tuple[Text, ...] = Field((), min_length=1)
    location: str = ""

    object_field: ClassVar[str] = "object_ids"

    @property
    def key(self) -> str:
        """Unique in a file."""
        return self.question_id

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, entry: Any) -> Any:
        return {name: value for name, value in entry.items() if value is not None} if isinstance(entry, dict) else entry


class AnsweredQuestion(Question):
    """A question of the training and validation splits, whose entries must have all fields."""

    answers: tuple[Text, ...] = Field(min_length=1)
    object_ids: tuple[Number, ...] = Field()
    object_names: tuple[Text, ...] = Field(min_length=1)


_DESCRIPTIONS = TypeAdapter(list[Description])
_QUESTIONS = TypeAdapter(list[Question])
_ANSWERED = TypeAdapter(list[AnsweredQuestion])


def read_scanrefer(path: Path | str) -> list[Description]:
    """All descriptions of a ``ScanRefer_filtered_*.json``, in the file's order.

    Raises:
        ValueError: the file is not readable, a field is missing or invalid, or two entries have the same scene_id,
            object_id and ann_id. The message has entry and field of the first ten errors.
    """
    found: list[Description] = _read(path, SCANREFER, _DESCRIPTIONS)
    keys = [(each.scene_id, each.object_id, each.ann_id) for each in found]
    _check_unique(path, keys, "scene_id, object_id and ann_id")
    return found


def read_scanqa(path: Path | str, answers_needed: bool = True) -> list[Question]:
    """All questions of a ``ScanQA_v1.0_*.json``, in the file's order.

    Args:
        path: the file.
        answers_needed: whether a question without answers is an error; ScanQA's test splits have none.

    Raises:
        ValueError: see `read_scanrefer`; or a question_id occurs twice.
    """
    found: list[Question] = _read(path, SCANQA, _ANSWERED if answers_needed else _QUESTIONS)
    _check_unique(path, [each.question_id for each in found], "question_id")
    return found


def _read(path: Path | str, expected: str, adapter: TypeAdapter[Any]) -> list[Any]:
    entries = validate(adapter, read_json(path, expected), path, counted=True)
    if not entries:
        raise ValueError(f"{path} holds an empty list; copy the file again.")
    return [each.model_copy(update={"location": f"{path}: entry {i}"}) for i, each in enumerate(entries, start=1)]


def _check_unique(path: Path | str, keys: Sequence[Hashable], fields: str) -> None:
    first: dict[Hashable, int] = {}
    problems = []
    for number, key in enumerate(keys, start=1):
        if first.setdefault(key, number) != number:
            problems.append(f"{path}: entry {number}: field {fields} repeats entry {first[key]}; remove one of the two")
    raise_problems(path, problems)
