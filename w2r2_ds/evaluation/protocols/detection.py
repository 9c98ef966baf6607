"""Detection: precision, recall and F1 of labelled boxes, this project's own protocol ``detection/f1``.

Within a sample and a label, predicted boxes are matched with annotated ones greedily, by decreasing exact oriented IoU,
each box once. A pair is a hit if its IoU, rounded to ``IOU_DECIMALS``, is >= k. Hits, predictions and annotations are
summed over all samples and labels (micro average):

    precision = hits / predictions    recall = hits / annotations    F1 = 2 hits / (predictions + annotations)

An answer that cannot be parsed (``parse_objects``) counts as no predictions, so all its annotations are missed. Labels
are compared without case and without white space at the ends. Predicted and annotated boxes are in the camera of the
sample's first frame. VG-LLM's evaluator (``src/lmms_eval/tasks/threedod/utils.py``) differs: it matches predictions in
the order of the answer, requires IoU > 0.25 from pytorch3d, and averages F1 over 8, 20 or 31 categories.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.data.sources.validation import FrozenModel
from w2r2_ds.data.tasks.parsing import AnswerError, parse_objects
from w2r2_ds.evaluation.protocols.records import (
    IOU_DECIMALS,
    THRESHOLDS,
    AnswerRecord,
    Box9,
    RecordFields,
    check_keys,
)
from w2r2_ds.evaluation.protocols.registry import ItemTerms, Protocol, ProtocolResult, register_protocol


def score_f1(records: Sequence[AnswerRecord]) -> ProtocolResult:
    """Precision, recall and F1 at each IoU threshold.

    Args:
        records: all samples, with the fields of `DetectionRecord`.

    Returns:
        ``protocol``, ``samples``, ``objects``, ``predictions``, ``parsed`` (share of answers that could be parsed),
        ``failures`` (reason -> number of answers); ``at``: threshold as text -> ``hits``, and ``precision``,
        ``recall``, ``F1`` (None if the denominator is 0); ``items``: sample id -> ``predictions``, ``objects``,
        ``ious`` of the matched pairs, ``reason`` (None if the answer could be parsed).

    Raises:
        ValueError: there are no records, or two of one sample.
    """
    check_keys("detections", [record["id"] for record in records])
    items = {record["id"]: _item(record) for record in records}
    predictions = sum(item["predictions"] for item in items.values())
    objects = sum(item["objects"] for item in items.values())
    at = {}
    for k in THRESHOLDS:
        # The matching does not depend on k: pairs of IoU >= k are matched before all others.
        hits = sum(iou >= k for item in items.values() for iou in item["ious"])
        at[str(k)] = {
            "hits": hits,
            "precision": _ratio(hits, predictions),
            "recall": _ratio(hits, objects),
            "F1": _ratio(2 * hits, predictions + objects),
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


def f1_terms(result: ProtocolResult) -> list[ItemTerms]:
    """``Protocol.item_terms``: F1 = sum(2 hits) / sum(predictions + objects)."""
    return [
        ItemTerms(
            (),
            {
                f"F1@{k}": (2.0 * sum(iou >= k for iou in item["ious"]), float(item["predictions"] + item["objects"]))
                for k in THRESHOLDS
            },
        )
        for item in result["items"].values()
    ]


def match(predicted: Sequence[np.ndarray], annotated: Sequence[np.ndarray]) -> list[float]:
    """Match the boxes of one label greedily: the pair of highest IoU first, then the best of the remaining boxes.

    Args:
        predicted: boxes ``[9]``.
        annotated: boxes ``[9]``.

    Returns:
        IoU of the matched pairs, decreasing, rounded to ``IOU_DECIMALS``; pairs without overlap are not matched.
    """
    if not predicted or not annotated:
        return []
    pairs = [(i, j) for i in range(len(predicted)) for j in range(len(annotated))]
    first, second = ([predicted[i] for i, _ in pairs], [annotated[j] for _, j in pairs])
    ious = box_iou(*(torch.tensor(np.stack(boxes), dtype=torch.float64) for boxes in (first, second))).tolist()
    matched_predicted, matched_annotated = set[int](), set[int]()
    found = []
    # Sorting is stable: of pairs with equal IoU, the one that is earlier in answer and annotation comes first.
    for iou, (i, j) in sorted(zip(ious, pairs, strict=True), key=lambda pair: -pair[0]):
        if iou > 0 and i not in matched_predicted and j not in matched_annotated:
            matched_predicted.add(i)
            matched_annotated.add(j)
            found.append(round(iou, IOU_DECIMALS))
    return found


def _item(record: AnswerRecord) -> dict[str, Any]:
    """One sample's entry of ``items``."""
    reason, objects = None, []
    if record["text"] is None:
        reason = "there is no prediction"
    else:
        try:
            objects = parse_objects(record["text"])
        except AnswerError as error:
            reason = error.reason
    annotations = [(labeled["label"], np.array(labeled["box"])) for labeled in record["objects"]]
    predicted, annotated = _by_label(objects), _by_label(annotations)
    # Labels that are only predicted have no pairs; their boxes count in the number of predictions.
    ious = [iou for label in annotated for iou in match(predicted.get(label, ()), annotated[label])]
    return {"predictions": len(objects), "objects": len(annotations), "ious": ious, "reason": reason}


def _by_label(objects: Sequence[tuple[str, np.ndarray]]) -> Mapping[str, list[np.ndarray]]:
    """Boxes grouped by normalised label."""
    gathered: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for label, box in objects:
        gathered[label.strip().lower()].append(box)
    return gathered


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class ObjectFields(FrozenModel):
    """One annotated object of a record."""

    label: str
    box: Box9


class DetectionRecord(RecordFields):
    """Fields of a record that detection protocols read."""

    objects: list[ObjectFields]


register_protocol(
    Protocol(
        name="detection/f1",
        description="This project's own: strict JSON, exact oriented IoU, greedy matching per label, micro average.",
        source="w2r2_ds/evaluation/protocols/detection.py",
        score=score_f1,
        metrics={f"F1@{k}": ("at", str(k), "F1") for k in THRESHOLDS},
        best_by="F1@0.25",
        record_model=DetectionRecord,
        default=True,
        item_terms=f1_terms,
    )
)
