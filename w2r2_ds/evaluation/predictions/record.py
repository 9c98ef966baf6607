"""One answer as plain JSON, with everything that is needed to score it again without model, images or annotations.

id, task, scene_id  of the sample
text                the answer as it was generated; null where there is no prediction (files of other projects)
tokens              its token ids, without the end of turn
question            as it was asked
form                how an answer places its object, for ScanRefer: ``camera`` (frame and box in that frame's camera),
                    ``world`` (six numbers, lowest and highest corner) or ``box`` (``box`` holds the world box)
target              the object that is meant: box, object_id, object_name, ann_id, group, group_nyu40, scannet_class,
                    described (``data.sample.Target``); null where there is none
cam_to_world        ``[frames][4][4]`` camera to axis-aligned world, where ``form`` is ``camera``
references          texts and words, for captions and short answers
objects             labels and boxes, for detection

Groups and classes were found over all of a split when it was prepared, so records of a part of it are grouped rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w2r2_ds.types.sample import Sample, Target

FORMS = ("camera", "world", "box")
"""See ``form`` above."""
WORLD_FORMAT = "x_min,y_min,z_min,x_max,y_max,z_max"
"""In the questions that ask for a world box (Video-3D-LLM's "gen" template)."""


def record_of(sample: Sample, text: str | None, tokens: Sequence[int] = ()) -> dict[str, Any]:
    """The record of one answer, or of none.

    Args:
        sample: what was asked.
        text: the generated text; None for no prediction.
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
    }
    if sample.task == "scanrefer":
        record["form"] = "world" if WORLD_FORMAT in sample.question else "camera"
        if record["form"] == "camera":
            record["cam_to_world"] = sample.cam_to_world.tolist()
    if sample.task == "detection":
        record["objects"] = [{"label": each.label, "box": each.box.tolist()} for each in sample.objects]
    return record


def _target(target: Target) -> dict[str, Any]:
    arrays = {"box": target.box.tolist(), "described": None if target.described is None else target.described.tolist()}
    return {**vars(target), **arrays}
