"""Questions of the pretraining: prompts and answers of ScanRefer, Scan2Cap and ScanQA about a view of a room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from w2r2_ds.data.tasks import scan2cap, scanqa, scanrefer
from w2r2_ds.demo.pretraining.pair.model import phrase
from w2r2_ds.demo.pretraining.pair.rooms.room_set import CLASSES, COLORS
from w2r2_ds.demo.pretraining.pair.rooms.views import RoomData, View
from w2r2_ds.demo.pretraining.pair.settings import Settings
from w2r2_ds.demo.synthetic.phrases import CLASS_ALONE

DECIMALS = 1
"""Digits after the decimal point of coordinates: 0.1 m is the accuracy that a tiny model reaches."""

Task = Literal["grounding", "caption", "answer"]


@dataclass(frozen=True)
class TaskQuestion:
    """A question and its answer.

    Attributes:
        task: kind of the question.
        question: text of the prompt after the frames.
        answer: text of the answer.
        target: index of the object; -1 for a number of objects.
    """

    task: Task
    question: str
    answer: str
    target: int


def grounding(data: RoomData, view: View, target: int, with_color: bool = True) -> TaskQuestion:
    """ScanRefer: phrase -> world box."""
    rooms = data.rooms
    color = COLORS[rooms.colors[view.room, target]] if with_color else None
    text = phrase(CLASSES[rooms.classes[view.room, target]], color)
    answer = scanrefer.world_answer_text(view.boxes[target], DECIMALS)
    return TaskQuestion("grounding", scanrefer.question_text(text, scanrefer.WORLD_QUESTION), answer, target)


def caption(data: RoomData, view: View, target: int) -> TaskQuestion:
    """Scan2Cap: centre of a box -> phrase."""
    rooms = data.rooms
    text = phrase(CLASSES[rooms.classes[view.room, target]], COLORS[rooms.colors[view.room, target]])
    box = np.concatenate([view.boxes[target], np.zeros(3)])
    return TaskQuestion("caption", scan2cap.question_text(box, decimals=DECIMALS), text.capitalize(), target)


def answers(data: RoomData, view: View) -> list[TaskQuestion]:
    """ScanQA: all questions of a room about numbers, and about colours of objects that the view shows."""
    shown = data.rooms.visible[view.room, view.frames].any(axis=0)
    return [
        TaskQuestion("answer", scanqa.question_text(q.text), q.answer, q.target)
        for q in data.rooms.questions[view.room]
        if q.target < 0 or shown[q.target]
    ]


def targets(data: RoomData, view: View) -> np.ndarray:
    """Indices of the objects that the view shows and whose class and colour no other object has."""
    shown = data.rooms.visible[view.room, view.frames].any(axis=0)
    return np.flatnonzero(shown & data.unique[view.room])


def draw_questions(data: RoomData, view: View, rng: np.random.Generator, settings: Settings) -> list[TaskQuestion]:
    """`Settings.questions` random questions about a view that has `targets`; the targets of a task are spread."""
    objects = rng.permutation(targets(data, view))
    about_rooms = answers(data, view)
    about_colors = [question for question in about_rooms if question.target >= 0]
    drawn = []
    for index in range(settings.questions):
        kind, target = rng.random(), int(objects[index % len(objects)])
        if kind < settings.captions:
            drawn.append(caption(data, view, target))
        elif kind < settings.captions + settings.answers and about_rooms:
            found = about_colors if about_colors and rng.random() < settings.colors else about_rooms
            drawn.append(found[int(rng.integers(len(found)))])
        else:
            alone = bool(data.single[view.room, target]) and rng.random() < CLASS_ALONE
            drawn.append(grounding(data, view, target, with_color=not alone))
    return drawn
