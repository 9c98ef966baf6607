"""Detection: precision, recall and F1 of labelled boxes, this project's own protocol ``detection/f1``.

Within a sample and a label, pairs of a predicted and an annotated box are taken by falling exact oriented IoU, each box
once; a pair is a hit where IoU >= k (rounded to ``IOU_DECIMALS``). Hits, predictions and annotations are summed over
all samples and labels (micro):

    precision = hits / predictions    recall = hits / annotations    F1 = 2 hits / (predictions + annotations)

An answer that cannot be read (``data.answers.parse_objects``) counts as no predictions, so its annotations are missed.
Labels are compared as written, but for case and blanks at the ends. Boxes are in the camera of the sample's first frame
on both sides. VG-LLM's evaluator differs: it takes predictions in the order of the answer, IoU > 0.25 from pytorch3d,
and averages F1 over a list of categories.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.data.tasks.parsing import AnswerError, parse_objects
from w2r2_ds.evaluation.protocols.scanrefer import IOU_DECIMALS, THRESHOLDS

Labelled = tuple[str, np.ndarray]
"""A category and a ``[9]`` box."""


@dataclass(frozen=True)
class Scene:
    """What is to be found in one sample, and the answer; None for no prediction."""

    name: str
    objects: Sequence[Labelled]
    answer: str | None


def score_f1(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Precision, recall and F1 at each threshold.

    Returns:
        ``protocol``, ``samples``, ``objects``, ``predictions``, ``parsed`` (share of answers that could be read),
        ``failures`` (how often each reason was given); ``at``: threshold as text -> ``hits``, ``precision``,
        ``recall``, ``F1`` (None where nothing is divided by); ``items``: name -> ``predictions``, ``objects``, ``ious``
        of the pairs, ``reason``.

    Raises:
        ValueError: there are no samples, or one is there twice.
    """
    if not scenes:
        raise ValueError("There are no detections to score.")
    twice = [name for name, number in Counter(each.name for each in scenes).items() if number > 1]
    if twice:
        raise ValueError(f"{len(twice)} samples have more than one answer, the first is {twice[0]!r}.")
    items = {each.name: _item(each) for each in scenes}
    predictions = sum(item["predictions"] for item in items.values())
    objects = sum(item["objects"] for item in items.values())
    at = {}
    for k in THRESHOLDS:
        hits = sum(iou >= k for item in items.values() for iou in item["ious"])
        at[str(k)] = {
            "hits": hits,
            "precision": _share(hits, predictions),
            "recall": _share(hits, objects),
            "F1": _share(2 * hits, predictions + objects),
        }
    reasons = Counter(item["reason"] for item in items.values() if item["reason"] is not None)
    return {
        "protocol": "f1",
        "samples": len(items),
        "objects": objects,
        "predictions": predictions,
        "parsed": 1 - sum(reasons.values()) / len(items),
        "failures": dict(sorted(reasons.items())),
        "at": at,
        "items": items,
    }


def match(predicted: Sequence[np.ndarray], annotated: Sequence[np.ndarray]) -> list[float]:
    """IoU of the pairs of one label, falling: the best pair first, then the best of the boxes that are left."""
    if not predicted or not annotated:
        return []
    pairs = [(i, j) for i in range(len(predicted)) for j in range(len(annotated))]
    first, second = ([predicted[i] for i, _ in pairs], [annotated[j] for _, j in pairs])
    ious = box_iou(*(torch.tensor(np.stack(boxes), dtype=torch.float64) for boxes in (first, second))).tolist()
    used: tuple[set[int], set[int]] = (set(), set())
    found = []
    # Of equal pairs the earlier in answer and annotation comes first: sorting is stable.
    for iou, (i, j) in sorted(zip(ious, pairs, strict=True), key=lambda pair: -pair[0]):
        if iou > 0 and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            found.append(round(iou, IOU_DECIMALS))
    return found


def _item(scene: Scene) -> dict[str, Any]:
    reason, predicted = None, []
    if scene.answer is None:
        reason = "there is no prediction"
    else:
        try:
            predicted = parse_objects(scene.answer)
        except AnswerError as error:
            reason = error.reason
    ours, truth = _by_label(predicted), _by_label(scene.objects)
    ious = [iou for label in truth for iou in match(ours.get(label, ()), truth[label])]
    return {"predictions": len(predicted), "objects": len(scene.objects), "ious": ious, "reason": reason}


def _by_label(objects: Sequence[Labelled]) -> Mapping[str, list[np.ndarray]]:
    gathered: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for label, box in objects:
        gathered[label.strip().lower()].append(box)
    return gathered


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
