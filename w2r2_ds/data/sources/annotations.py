"""The annotation files of ScanRefer and ScanQA, read whole and checked.

``ScanRefer_filtered_{train,val}.json`` (Scan2Cap's annotations too)::

    [{"scene_id": "scene0000_00", "object_id": "39", "object_name": "office_chair", "ann_id": "0",
      "description": "...", "token": ["the", ...]}, ...]

``ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json``, the last two without answers, the last without objects::

    [{"scene_id": "scene0000_00", "question_id": "train-scene0000-0", "question": "...", "answers": ["brown", ...],
      "object_ids": [8], "object_names": ["table"]}, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2r2_ds.data.sources.entries import Entry, Problems, read_entries

SCANREFER = "ScanRefer's annotations, which its authors send on request"
SCANQA = "ScanQA's annotations, from its public download"


@dataclass(frozen=True)
class Description:
    """A sentence about one object.

    Attributes:
        scene_id: ScanNet scene name.
        object_id: instance id in the scene.
        object_name: as in the file, with underscores for blanks.
        ann_id: number of this description of the object, as in the file.
        text: the sentence.
        words: the sentence as the file splits it.
        where: file, line and entry, for messages.
    """

    scene_id: str
    object_id: int
    object_name: str
    ann_id: str
    text: str
    words: tuple[str, ...]
    where: str

    @property
    def key(self) -> str:
        """Unique in a file: ``"scene0000_00|39|office_chair|0"``."""
        return f"{self.scene_id}|{self.object_id}|{self.object_name}|{self.ann_id}"


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        scene_id: ScanNet scene name.
        question_id: unique in a file.
        text: the question.
        answers: all reference answers; empty only where none were needed.
        object_ids: instances that the question is about; empty in ScanQA's test split without objects.
        object_names: their names.
        where: file, line and entry, for messages.
    """

    scene_id: str
    question_id: str
    text: str
    answers: tuple[str, ...]
    object_ids: tuple[int, ...]
    object_names: tuple[str, ...]
    where: str


def read_scanrefer(path: Path | str) -> list[Description]:
    """Every description of a ``ScanRefer_filtered_*.json``, in the file's order.

    Raises:
        ValueError: the file is not readable, or entries lack a usable field or repeat another's scene, object and
            ann_id; all of them are named, by line and field (the first ten, and how many there are).
    """
    problems, found, seen = Problems(path), [], _Seen("scene_id, object_id and ann_id")
    for entry in read_entries(path, SCANREFER, problems):
        values = _values(entry, _SCANREFER_FIELDS, problems)
        if values is None:
            continue
        description = Description(**values, where=entry.where)
        seen.check((description.scene_id, description.object_id, description.ann_id), entry, problems)
        found.append(description)
    return _whole(found, problems)


def read_scanqa(path: Path | str, answers_needed: bool = True) -> list[Question]:
    """Every question of a ``ScanQA_v1.0_*.json``, in the file's order.

    Args:
        path: the file.
        answers_needed: whether a question without answers is an error; ScanQA's test splits have none.

    Raises:
        ValueError: see `read_scanrefer`; a question_id occurs twice; or no question has the answers that are needed.
    """
    problems, found, seen = Problems(path), [], _Seen("question_id")
    entries = read_entries(path, SCANQA, problems)
    if answers_needed and entries and not any(entry.has("answers") for entry in entries):
        raise ValueError(
            f"{path}: no entry has the field 'answers'; ScanQA's test splits cannot be trained on or scored here, "
            "so use the train or val file"
        )
    for entry in entries:
        # Only what a test split leaves out may be missing, and only as a whole.
        optional = ("object_ids", "object_names") if answers_needed else ("answers", "object_ids", "object_names")
        fields = {name: each for name, each in _SCANQA_FIELDS.items() if name not in optional or entry.has(each[0])}
        values = _values(entry, fields, problems)
        if values is None:
            continue
        question = Question(**{name: values.get(name, ()) for name in _SCANQA_FIELDS}, where=entry.where)
        seen.check(question.question_id, entry, problems)
        found.append(question)
    return _whole(found, problems)


_Fields = Mapping[str, tuple[str, Callable[[Entry, str], Any]]]
"""Attribute -> field of the file and how to read it."""


def _tokens(entry: Entry, field: str) -> tuple[str, ...]:
    return entry.texts(field, blanks=True)


def _identity(entry: Entry, field: str) -> str:
    """ScanRefer writes ann_id as a string of digits."""
    return str(entry.integer(field))


_SCANREFER_FIELDS: _Fields = {
    "scene_id": ("scene_id", Entry.scene),
    "object_id": ("object_id", Entry.integer),
    "object_name": ("object_name", Entry.name),
    "ann_id": ("ann_id", _identity),
    "text": ("description", Entry.text),
    "words": ("token", _tokens),
}
_SCANQA_FIELDS: _Fields = {
    "scene_id": ("scene_id", Entry.scene),
    "question_id": ("question_id", Entry.name),
    "text": ("question", Entry.text),
    "answers": ("answers", Entry.texts),
    "object_ids": ("object_ids", Entry.integers),
    "object_names": ("object_names", Entry.texts),
}


class _Seen:
    """Which keys were there, and where first."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._first: dict[Any, str] = {}

    def check(self, key: Any, entry: Entry, problems: Problems) -> None:
        first = self._first.setdefault(key, entry.where)
        if first != entry.where:
            place = first[len(str(problems.path)) + 2 :]
            problems.add(f"{entry.where}: field {self.what} repeats {place}; remove one of the two")


def _values(entry: Entry, fields: _Fields, problems: Problems) -> dict[str, Any] | None:
    """Every attribute; None if one of them cannot be had, and then all such are noted."""
    before = problems.count
    values = {name: problems.read(read, entry, field) for name, (field, read) in fields.items()}
    return values if problems.count == before else None


def _whole(found: list[Any], problems: Problems) -> list[Any]:
    problems.raise_any()
    if not found:
        raise ValueError(f"{problems.path} holds an empty list; copy the file again")
    return found
