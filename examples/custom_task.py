"""A task of your own with its scores: how many objects of a category a scene has.

    python launchers/prepare.py counting --plugin examples/custom_task.py --root data/scannet

Annotations are ``ROOT/counting/SPLIT.json``: ``[{"scene_id": "scene0000_00", "name": "chair", "count": 4}, ...]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.sources.validation import FrozenModel, Name, Number, SceneId, validate
from w2r2_ds.data.tasks.base import InputFile, Job, PreparedItems, Task, TaskOptions, register_task
from w2r2_ds.data.tasks.common import frame_fields
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.evaluation.protocols.records import AnswerRecord, RecordFields, ReferenceFields
from w2r2_ds.evaluation.protocols.registry import Protocol, register_protocol
from w2r2_ds.types.sample import Kind, Reference, Sample
from w2r2_ds.utils.json_io import read_json


class Count(FrozenModel):
    scene_id: SceneId
    name: Name
    count: Number
    location: str = ""
    object_ids: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.scene_id}|{self.name}"


@register_task
class Counting(Task):
    name = "counting"
    cli_options = ("frames",)

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        return InputFile("annotations", root / "counting" / f"{options.split}.json", "your own")

    def read(self, root: Path, options: TaskOptions) -> Sequence[Any]:
        path = self.annotations(root, options).path
        return validate(TypeAdapter(list[Count]), read_json(path), path, counted=True)

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        made: PreparedItems = []
        for number, item in job.items:
            frames = [scene.frames[i] for i in select_frames(options.frames, scene, item.key, None) or ()]
            texts = {"question": f"How many {item.name}s are there?", "answer": str(item.count)}
            references = (Reference(texts["answer"]),)
            fields = {**frame_fields(frames), **texts, "references": references}
            made.append((number, Sample(item.key, self.name, scene.scene_id, **fields)))
        return made

    def kind(self, options: TaskOptions) -> Kind:
        return "answer"

    def parse(self, text: str, frame_count: int) -> int:
        try:
            return int(text)
        except ValueError:
            raise AnswerError("it is not an integer") from None

    def text_similarity(self, prediction: str, reference: str) -> float | None:
        return 1 / (1 + abs(int(prediction) - int(reference))) if prediction.isdecimal() else 0.0


class CountingRecord(RecordFields):
    references: list[ReferenceFields]


def score_accuracy(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    hits = {record["id"]: record["text"] == record["references"][0]["text"] for record in records}
    return {"accuracy": sum(hits.values()) / len(hits), "items": hits}


register_protocol(
    Protocol(
        name="counting/accuracy",
        description="Share of answers that equal the annotated number.",
        source="this file",
        score=score_accuracy,
        metrics={"accuracy": ("accuracy",)},
        best_by="accuracy",
        record_model=CountingRecord,
        default=True,
    )
)
