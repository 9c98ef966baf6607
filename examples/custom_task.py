"""A custom task with its scoring protocol: the number of objects of a category in a scene.

    python launchers/prepare.py counting --plugin examples/custom_task.py --root data/scannet

Annotations: ``ROOT/counting/SPLIT.json``, ``[{"scene_id": "scene0000_00", "name": "chair", "count": 4}, ...]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from w2r2_ds.data.frames.selection import select_frames
from w2r2_ds.data.sources.scannet import Scene
from w2r2_ds.data.sources.validation import FrozenModel, IntegerOrDigits, Name, SceneId, validate
from w2r2_ds.data.tasks.base import InputFile, Job, PreparedItems, Task, TaskOptions, register_task
from w2r2_ds.data.tasks.common import frame_fields
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.evaluation.protocols.records import AnswerRecord, RecordFields, ReferenceFields
from w2r2_ds.evaluation.protocols.registry import Protocol, register_protocol
from w2r2_ds.types.sample import BoxFormat, Kind, Reference, Sample
from w2r2_ds.utils.files.json_io import read_json


class Count(FrozenModel):
    """One annotation; implements ``data.tasks.base.Item``. Wrong fields raise ValueError with file and entry."""

    scene_id: SceneId
    name: Name
    count: IntegerOrDigits
    location: str = ""  # file and entry, for messages about this annotation
    object_ids: tuple[int, ...] = ()  # objects that need a box: none

    @property
    def key(self) -> str:
        """Id of the sample."""
        return f"{self.scene_id}|{self.name}"


@register_task
class Counting(Task):
    """A category -> the number of its objects in the scene."""

    name = "counting"
    cli_options = ("frames",)  # w2r2 prepare counting has --frames.protocol, --frames.count, ...

    def annotations(self, root: Path, options: TaskOptions) -> InputFile:
        return InputFile("annotations", root / "counting" / f"{options.split}.json", origin="your own")

    def read(self, root: Path, options: TaskOptions) -> Sequence[Any]:
        path = self.annotations(root, options).path
        return validate(TypeAdapter(list[Count]), read_json(path), path, counted=True)

    def make_samples(self, scene: Scene, job: Job, options: TaskOptions) -> PreparedItems:
        samples: PreparedItems = []
        for index, item in job.items:  # index: position of the annotation in the file
            positions = select_frames(options.frames, scene, item.key, None)
            assert positions is not None, "frames are always found if no object must be visible"
            sample = Sample(
                id=item.key,
                task=self.name,
                scene_id=scene.scene_id,
                question=f"How many {item.name}s are there?",
                answer=str(item.count),
                references=(Reference(str(item.count)),),  # for scoring
                **frame_fields([scene.frames[position] for position in positions]),
            )
            samples.append((index, sample))
        return samples

    def kind(self, options: TaskOptions) -> Kind:
        return "answer"

    def parse(self, text: str, frame_count: int, box_format: BoxFormat = "camera") -> int:
        # Evaluation reports the share of answers that are parsed without AnswerError.
        try:
            return int(text)
        except ValueError:
            raise AnswerError("it is not an integer") from None

    def text_similarity(self, prediction: str, reference: str) -> float | None:
        # The similarity s of the objective, in [0, 1]: 1 for the right number, 1/2 for a neighbouring one, ...
        return 1 / (1 + abs(int(prediction) - int(reference))) if prediction.isdecimal() else 0.0


class CountingRecord(RecordFields):
    """The fields of a saved answer that the protocol reads, besides id, task, scene_id and text."""

    references: list[ReferenceFields]


def score_accuracy(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Accuracy over all records; a missing prediction (text None) counts as wrong."""
    hits = {record["id"]: record["text"] == record["references"][0]["text"] for record in records}
    return {"accuracy": sum(hits.values()) / len(hits), "items": hits}


register_protocol(
    Protocol(
        name="counting/accuracy",
        description="Share of answers that equal the annotated number.",
        source="this file",
        score=score_accuracy,
        metrics={"accuracy": ("accuracy",)},  # name -> path in the result of `score`
        best_by="accuracy",  # selects the best checkpoint
        record_model=CountingRecord,
        default=True,
    )
)
