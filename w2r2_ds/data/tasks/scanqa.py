"""ScanQA: a question about a scene -> a short answer, in Video-3D-LLM's format (VG-LLM has no such task).

Training: one sample per reference answer, with the id ``scanqa_QUESTION_NUMBER``. Validation: one sample per question;
its label is the first answer, and all its answers are references. The test splits have no answers; the label of their
samples is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.sources.annotations import Question, read_scanqa
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.tasks.base import InputFile, Job, PreparedItems, Task, TaskOptions, is_validation, register_task
from w2r2_ds.data.tasks.common import SCANQA_ACCESS, frame_fields, move_sample
from w2r2_ds.types.sample import Reference, Sample

if TYPE_CHECKING:  # it imports torch
    from w2r2_ds.models.geometry.point_transforms import Similarity

QUESTION = "{question} Answer the question simply."


def question_text(question: str) -> str:
    """The text of the prompt after the frames."""
    return QUESTION.format(question=question)


def question_span(question: str) -> tuple[int, int]:
    """Characters ``[begin, end)`` of `question_text` that are the question, without surrounding white space."""
    begin = len(question) - len(question.lstrip())
    return begin, begin + len(question.strip())


def _sample(
    scene: Scene,
    question: Question,
    options: TaskOptions,
    key: str,
    answer: str,
    references: tuple[Reference, ...] = (),
) -> Sample:
    chosen = select_frames(options.frames, scene, key, None)
    assert chosen is not None, "without visibility, frames are always found"
    return Sample(
        id=key,
        task="scanqa",
        scene_id=question.scene_id,
        **frame_fields([scene.frames[p] for p in chosen]),
        question=question_text(question.text),
        answer=answer,
        what=question_span(question.text),
        references=references,
    )


@register_task
class ScanQA(Task):
    """A question about a scene -> a short answer."""

    name = "scanqa"
    formats = ("video3dllm",)
    splits = ("train", "val", "test_w_obj", "test_wo_obj")
    published: ClassVar = {"val": 4675}
    cli_options = ("frames",)

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        return InputFile("annotations", root / "ScanQA" / f"ScanQA_v1.0_{options.split}.json", SCANQA_ACCESS)

    def read(self, root: Path, options: TaskOptions) -> Sequence[Question]:
        answers_needed = options.split == "train" or is_validation(options.split)
        return read_scanqa(self.annotations(root, options).path, answers_needed)

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        prepared: PreparedItems = []
        for number, question in job.items:
            if options.split == "train":
                for i, answer in enumerate(question.answers):
                    key = f"scanqa_{question.question_id}_{i}"
                    prepared.append((number, _sample(scene, question, options, key, answer)))
            else:
                answer = question.answers[0] if question.answers else ""
                references = tuple(Reference(text) for text in question.answers)
                prepared.append((number, _sample(scene, question, options, question.question_id, answer, references)))
        return prepared

    def change_world(self, sample: Sample, change: Similarity) -> Sample:
        return move_sample(sample, change)  # no coordinates in the texts

    def unit(self, options: TaskOptions) -> str:
        return "questions"
