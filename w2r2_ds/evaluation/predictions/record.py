"""Answer records: one generated answer as JSON values, with all data that its scoring needs.

Scoring a record again needs neither a model nor images nor annotation files. The fields:

id, task, scene_id  id of the sample, name of its task, id of its scene
text                the generated answer; null for a missing prediction (files of other projects)
tokens              token ids of the answer, without the end-of-turn token
question            text of the prompt after the frames
target              the annotated object of the question: box, object_id, object_name, ann_id, group, group_nyu40,
                    scannet_class, described (``types.sample.Target``); null if there is none
references          reference texts and their words (``text``, ``words``), for captions and short answers
objects             annotated objects (``label``, ``box``), for detection
form                only if the answer is a box, its coordinates: ``camera`` (a frame, and a box in that frame's
                    camera), ``world`` (six numbers, lowest and highest corner) or ``box`` (the field ``box``)
cam_to_world        ``[frames][4][4]`` camera to axis-aligned world, if ``form`` is ``camera``
box                 world box (centre, size; metres) of an answer in a file of another project, null if it has none
annotated           false if the split has no answers, so that the record cannot be scored; else missing
iou                 IoU of the described box (Scan2Cap), in files of other projects

Groups and classes were computed from the whole split when it was prepared, so they are valid for a subset too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w2r2_ds.types.sample import Sample, Target


def record_of(sample: Sample, text: str | None, tokens: Sequence[int] = ()) -> dict[str, Any]:
    """The record of one answer.

    Args:
        sample: sample with the question and the annotations.
        text: generated answer; None for a missing prediction.
        tokens: token ids of the answer.
    """
    record: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "scene_id": sample.scene_id,
        "text": text,
        "tokens": list(tokens),
        "question": sample.question,
        "target": None if sample.target is None else _target(sample.target),
        "references": [{"text": reference.text, "words": list(reference.words)} for reference in sample.references],
        "objects": [{"label": labeled.label, "box": labeled.box.tolist()} for labeled in sample.objects],
    }
    if not sample.is_annotated:
        record["annotated"] = False
    if sample.kind == "grounding":
        record["form"] = sample.box_format
        if sample.box_format == "camera":
            record["cam_to_world"] = sample.cam_to_world.tolist()
    return record


def _target(target: Target) -> dict[str, Any]:
    arrays = {"box": target.box.tolist(), "described": None if target.described is None else target.described.tolist()}
    return {**vars(target), **arrays}
