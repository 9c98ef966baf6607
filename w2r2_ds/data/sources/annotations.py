"""Readers of the annotation files of ScanRefer and ScanQA.

``ScanRefer_filtered_{train,val}.json``, also the annotations of Scan2Cap::

    [{"scene_id": "scene0000_00", "object_id": "39", "object_name": "office_chair", "ann_id": "0",
      "description": "...", "token": ["the", ...]}, ...]

``ann_id`` and ``token`` are optional. Only some protocols and other projects' prediction files need them, and say so.

``ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json``; both test files have no answers. The objects of a question
(``object_ids``, ``object_names``) are not used::

    [{"scene_id": "scene0000_00", "question_id": "train-scene0000-0", "question": "...", "answers": ["brown", ...]},
     ...]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from w2r2_ds.data.sources.validation import (
    FrozenModel,
    IntegerOrDigits,
    Name,
    SceneId,
    Text,
    integer_or_digits,
    raise_problems,
    validate,
)
from w2r2_ds.utils.files.json_io import read_json

SCANREFER_FILES = "ScanRefer's annotations, which its authors send on request"
SCANQA_FILES = "ScanQA's annotations, from its public download"


class _Entry(FrozenModel):
    """An entry of a file; null is a missing field (ScanQA's test splits have null in the fields that they lack).

    So is an empty text or list in an optional field, as in test splits whose answers or objects were removed.
    """

    @model_validator(mode="before")
    @classmethod
    def _empty_is_missing(cls, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value
            for name, value in entry.items()
            if value is not None and not (name in optional and value in ("", []))
        }


class Description(_Entry):
    """A sentence about one object.

    Attributes:
        scene_id: ScanNet scene name.
        object_id: instance id in the scene.
        object_name: name of the object as in the file, with underscores for spaces.
        ann_id: number of this description of the object, as in the file; empty if the file has none.
        text: the sentence.
        words: tokenization of the sentence in the file (field ``token``); words may be empty strings. Empty if the file
            has none.
        location: file and entry, for messages.
        ordinal: number of this description among those of the object, in the order of the file, from 0.
    """

    scene_id: SceneId
    object_id: IntegerOrDigits
    object_name: Name
    ann_id: Annotated[str, BeforeValidator(lambda value: str(integer_or_digits(value)))] = ""
    text: Text = Field(alias="description")
    words: tuple[str, ...] = Field((), alias="token", min_length=1)
    location: str = ""
    ordinal: int = 0

    object_field: ClassVar[str] = "object_id"

    @property
    def key(self) -> str:
        """Identifier, unique in a file: ``"scene0000_00|39|office_chair|0"``."""
        return f"{self.scene_id}|{self.object_id}|{self.object_name}|{self.number}"

    @property
    def number(self) -> str:
        """Number of this description of the object: `ann_id`, or `ordinal` if the file has none."""
        return self.ann_id or str(self.ordinal)

    @property
    def object_ids(self) -> tuple[int, ...]:
        """`object_id` as a tuple, as questions have it."""
        return (self.object_id,)


class HiddenDescription(Description):
    """A description of ScanRefer's hidden test split: the object has no box, and may have no id and no name."""

    object_id: IntegerOrDigits = 0
    object_name: Name = "unknown"

    @property
    def number(self) -> str:
        """As of a `Description`; `ordinal` without an object id, because `ann_id` counts the sentences of an object."""
        return super().number if "object_id" in self.model_fields_set else str(self.ordinal)

    @property
    def object_ids(self) -> tuple[int, ...]:
        """Empty: no box is needed."""
        return ()


class Question(_Entry):
    """A question about a scene.

    Attributes:
        scene_id: ScanNet scene name.
        question_id: identifier, unique in a file.
        text: the question.
        answers: all reference answers; empty in ScanQA's test splits.
        location: file and entry, for messages.
    """

    scene_id: SceneId
    question_id: Name
    text: Text = Field(alias="question")
    answers: tuple[Text, ...] = Field((), min_length=1)
    location: str = ""

    object_ids: ClassVar[tuple[int, ...]] = ()
    """Samples need no boxes, so the field of that name in the file is not read."""
    object_field: ClassVar[str] = "object_ids"

    @property
    def key(self) -> str:
        """Identifier, unique in a file: `question_id`."""
        return self.question_id


class AnsweredQuestion(Question):
    """A question of the training or validation split, where answers are required."""

    answers: tuple[Text, ...] = Field(min_length=1)


_DESCRIPTIONS = TypeAdapter(list[Description])
_HIDDEN_DESCRIPTIONS = TypeAdapter(list[HiddenDescription])
_QUESTIONS = TypeAdapter(list[Question])
_ANSWERED = TypeAdapter(list[AnsweredQuestion])


def read_scanrefer(path: Path | str, hidden: bool = False) -> list[Description]:
    """All descriptions of a ``ScanRefer_filtered_*.json``, in the file's order.

    Args:
        path: JSON file.
        hidden: whether it is the test split, whose descriptions are `HiddenDescription`.

    Raises:
        ValueError: the file is not readable, a field is missing or invalid, or two entries have the same scene_id,
            object_id and ann_id. The message has entry and field of the first ten errors.
    """
    read: list[Description] = _read(path, SCANREFER_FILES, _HIDDEN_DESCRIPTIONS if hidden else _DESCRIPTIONS)
    counts: Counter[tuple[str, int]] = Counter()  # descriptions of each object so far
    descriptions = []
    for description in read:
        place = description.scene_id, description.object_id
        descriptions.append(description.model_copy(update={"ordinal": counts[place]}))
        counts[place] += 1
    keys = [(description.scene_id, description.object_id, description.number) for description in descriptions]
    _check_unique(path, keys, "scene_id, object_id and ann_id")
    return descriptions


def read_scanqa(path: Path | str, answers_needed: bool = True) -> list[Question]:
    """All questions of a ``ScanQA_v1.0_*.json``, in the file's order.

    Args:
        path: JSON file.
        answers_needed: whether a question without answers is an error; ScanQA's test splits have none.

    Raises:
        ValueError: see `read_scanrefer`; or a question_id occurs twice.
    """
    questions: list[Question] = _read(path, SCANQA_FILES, _ANSWERED if answers_needed else _QUESTIONS)
    _check_unique(path, [question.question_id for question in questions], "question_id")
    return questions


def _read(path: Path | str, expected: str, adapter: TypeAdapter[Any]) -> list[Any]:
    """Entries of a JSON list, validated, each with its location."""
    entries = validate(adapter, read_json(path, expected), path, counted=True)
    if not entries:
        raise ValueError(f"{path} holds an empty list; copy the file again.")
    return [each.model_copy(update={"location": f"{path}: entry {i}"}) for i, each in enumerate(entries, start=1)]


def _check_unique(path: Path | str, keys: Sequence[Hashable], fields: str) -> None:
    """Raise ValueError if two entries have the same key."""
    first: dict[Hashable, int] = {}  # key -> number of the first entry that has it
    problems = []
    for number, key in enumerate(keys, start=1):
        if first.setdefault(key, number) != number:
            problems.append(f"{path}: entry {number}: field {fields} repeats entry {first[key]}; remove one of the two")
    raise_problems(path, problems)
