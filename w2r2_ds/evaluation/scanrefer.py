"""ScanRefer's Acc@k for answers that name a frame and a box in that frame's camera.

Protocol ``vgllm-direct, exact IoU``: the box is moved to the axis-aligned world with the predicted frame's pose and
compared as an oriented box with the annotated one (VG-LLM, ``src/lmms_eval/tasks/scanrefer/utils.py``). "Direct" means
without refinement by detected proposals. Three things differ from VG-LLM's evaluator, on purpose: angles are intrinsic
ZXY throughout, IoU is exact (pytorch3d's is wrong for some nearly aligned boxes; ``data/iou.py``), and answers are read
strictly as JSON (``data/answers.py``).

An answer that cannot be read counts as IoU 0 and stays in the denominator. Hits are ``IoU >= k``, as in every reference
implementation. Accuracies are fractions in 0..1. Other projects' protocols: ``evaluation/protocol.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from w2r2_ds.data.answers import AnswerError, parse_grounding
from w2r2_ds.data.boxes import camera_to_world
from w2r2_ds.data.iou import box_iou
from w2r2_ds.data.sample import Sample

PROTOCOL = "vgllm-direct, exact IoU"
THRESHOLDS = (0.25, 0.5)
GROUPS = ("unique", "multiple")

IOU_DECIMALS = 9
"""IoU is rounded to this before ``>=``: an exact half must not miss 0.5 by float64's last bit."""


class Prediction(TypedDict):
    """One scored answer; plain values, ready for a line of JSON.

    Keys:
        id: the sample's id.
        group: ``"unique"`` or ``"multiple"``.
        text: the answer as it was generated.
        iou: oriented IoU with the annotated box, 0 where the answer could not be read.
        parsed: whether it could be read.
        reason: why not; None where it could.
        frame: the predicted frame index, or None.
        box_world: the predicted box ``[9]`` in the axis-aligned world; None where there is none, or where
            its numbers are so large that the world's overflow.
    """

    id: str
    group: str
    text: str
    iou: float
    parsed: bool
    reason: str | None
    frame: int | None
    box_world: list[float] | None


def score_prediction(text: str, sample: Sample) -> Prediction:
    """Read one generated answer and compare its box with the sample's target."""
    assert sample.target is not None, "a ScanRefer sample has a target"
    return score_answer(sample.id, text, sample.cam_to_world, sample.target.box, sample.target.group)


def score_answer(identity: str, text: str, cam_to_world: np.ndarray, target: np.ndarray, group: str) -> Prediction:
    """Likewise from the parts of a sample: poses ``[frames, 4, 4]`` and world box ``[9]``."""
    record = Prediction(
        id=identity, group=group, text=text, iou=0.0, parsed=False, reason=None, frame=None, box_world=None
    )
    try:
        answer = parse_grounding(text, len(cam_to_world))
    except AnswerError as error:
        record["reason"] = error.reason
        return record
    with np.errstate(over="ignore", invalid="ignore"):
        box = camera_to_world(answer.box, cam_to_world[answer.frame])
    pair = torch.tensor([box.tolist(), target.tolist()], dtype=torch.float64)
    record["iou"] = float(box_iou(pair[:1], pair[1:]))
    record["parsed"] = True
    record["frame"] = answer.frame
    record["box_world"] = box.tolist() if np.isfinite(box).all() else None
    return record


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a whole set.

    Args:
        records: ``Prediction``s (or the same read back from JSON), one per sample; only id, group, iou, parsed and
            reason are looked at.

    Returns:
        ``protocol``; ``overall``, ``unique`` and ``multiple``, each with ``count``, ``acc@0.25``, ``acc@0.5`` and
        ``mean_iou`` (None for a group without samples); ``parsed``, the share that could be read; ``failures``, how
        often each reason was given.
    """
    rows = list(records)
    _check(rows)
    reasons = Counter(str(row["reason"]) for row in rows if not row["parsed"])
    return {
        "protocol": PROTOCOL,
        "overall": _scores([float(row["iou"]) for row in rows]),
        **{group: _scores([float(row["iou"]) for row in rows if row["group"] == group]) for group in GROUPS},
        "parsed": sum(bool(row["parsed"]) for row in rows) / len(rows),
        "failures": dict(sorted(reasons.items())),
    }


def _scores(ious: Sequence[float]) -> dict[str, float | int | None]:
    """Count, accuracies and mean IoU of one group."""
    count = len(ious)
    scores: dict[str, float | int | None] = {"count": count}
    for threshold in THRESHOLDS:
        hits = sum(round(iou, IOU_DECIMALS) >= threshold for iou in ious)
        scores[f"acc@{threshold}"] = hits / count if count else None
    scores["mean_iou"] = sum(ious) / count if count else None
    return scores


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse sets whose scores would mislead: none, or an answer counted twice, or an unknown group."""
    if not rows:
        raise ValueError("There are no predictions to summarise.")
    twice = [key for key, number in Counter(row["id"] for row in rows).items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} samples have more than one prediction, the first is {twice[0]!r}.")
    unknown = {row["group"] for row in rows} - set(GROUPS)
    if unknown:
        raise ValueError(f"A sample's group must be unique or multiple, not {sorted(map(str, unknown))}.")
