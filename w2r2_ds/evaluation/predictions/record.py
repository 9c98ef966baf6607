"""One answer as plain JSON, with everything that scoring it again needs: no model, images or annotations.

id, task, scene_id  of the sample
text                the generated answer; null without a prediction (files of other projects)
tokens              its token ids, without the end of turn
question            the text after the frames
form                coordinates of an answer that is a box: ``camera`` (frame and box in that frame's camera), ``world``
                    (six numbers, lowest and highest corner) or ``box`` (the field ``box`` holds the world box)
target              the object that is asked for: box, object_id, object_name, ann_id, group, group_nyu40,
                    scannet_class, described (``types.sample.Target``); null without one
cam_to_world        ``[frames][4][4]`` camera to axis-aligned world, if ``form`` is ``camera``
references          texts and words, for captions and short answers
objects             labels and boxes, for detection

Groups and classes were computed from the whole split when it was prepared, so they hold for records of a subset too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w2r2_ds.types.sample import Sample, Target

WORLD_FORMAT = "x_min,y_min,z_min,x_max,y_max,z_max"
"""In the questions that ask for a world box (Video-3D-LLM's "gen" template)."""


def record_of(sample: Sample, text: str | None, tokens: Sequence[int] = ()) -> dict[str, Any]:
    """The record of one answer.

    Args:
        sample: the question.
        text: the generated text; None without a prediction.
        tokens: its token ids.
    """
    record: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "scene_id": sample.scene_id,
        "text": text,
        "tokens": list(tokens),
        "question": sample.question,
        "target": None if sample.target is None else _target(sample.target),
        "references": [{"text": each.text, "words": list(each.words)} for each in sample.references],
        "objects": [{"label": each.label, "box": each.box.tolist()} for each in sample.objects],
    }
    if WORLD_FORMAT in sample.question:
        record["form"] = "world"
    elif sample.kind == "grounding":
        record |= {"form": "camera", "cam_to_world": sample.cam_to_world.tolist()}
    return record


def _target(target: Target) -> dict[str, Any]:
    arrays = {"box": target.box.tolist(), "described": None if target.described is None else target.described.tolist()}
    return {**vars(target), **arrays}
