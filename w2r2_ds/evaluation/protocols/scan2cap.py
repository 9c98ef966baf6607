"""Scan2Cap: captions of objects, gated by IoU, as six public evaluators score them (``scan2cap_rules.py``).

``m@k`` is a caption metric m over *all* annotated objects. The caption of an object counts only if the box that it
describes has IoU >= k (> k in ``scan2cap_original``) with the annotated one; otherwise a placeholder is scored in its
place. An object without a prediction fails every k and stays in the denominator.

A placeholder has CIDEr 0, but not ROUGE-L, METEOR or BLEU-1 of 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat

from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.data.sources.validation import FrozenModel
from w2r2_ds.evaluation.metrics.captions import (
    CAPTION_METRICS,
    ITEM_MEANS,
    PAPER_METRICS,
    CaptionScores,
    MetricValue,
    score_captions,
)
from w2r2_ds.evaluation.protocols.records import (
    THRESHOLDS,
    AnswerRecord,
    Box6,
    Box9,
    Proposals,
    RecordFields,
    ReferenceFields,
    check_keys,
    enclosing_box,
    raise_with_first,
)
from w2r2_ds.evaluation.protocols.registry import ItemTerms, Protocol, ProtocolResult, register_protocol
from w2r2_ds.evaluation.protocols.scan2cap_rules import (
    SCAN2CAP_RULES,
    Caption,
    DescribedObject,
    Scan2CapRules,
    split_words,
)

if TYPE_CHECKING:
    from w2r2_ds.evaluation.metrics.meteor import Java


def score_scan2cap(
    objects: Sequence[DescribedObject],
    captions: Mapping[str, Caption],
    protocol: str,
    thresholds: Sequence[float] = THRESHOLDS,
    java: Java | None = None,
) -> ProtocolResult:
    """Caption metrics at each IoU threshold.

    Args:
        objects: all annotated objects; the CIDEr of a subset is not comparable with that of the whole.
        captions: ``DescribedObject.key`` -> caption; objects without one are failures.
        protocol: a key of ``SCAN2CAP_RULES``.
        thresholds: IoU thresholds k.
        java: see `score_captions`.

    Returns:
        ``protocol``, ``objects``, ``missing`` (objects without a prediction) and ``at``: threshold as text ->
        ``passed`` (number of captions with a sufficient IoU), ``corpus``, ``items``, ``candidates``, ``references``,
        ``not_computed`` (see `CaptionScores`). Instead of the items, ``scan2cap_benchmark`` has ``precision``,
        ``recall``, ``f1``, ``mask`` and ``items_before_mask``; its ``corpus`` is the recall.

    Raises:
        ValueError: no objects, an object twice, a caption of an unknown object, or a caption without the words that the
            protocol needs.
    """
    check_keys("annotated objects", [annotated.key for annotated in objects], captions)
    rules = SCAN2CAP_RULES[protocol]
    ious = {annotated.key: _iou(annotated, captions.get(annotated.key), rules) for annotated in objects}
    # An object without a caption fails every k, also 0.
    passed = {k: {key for key, iou in ious.items() if key in captions and rules.passes(iou, k)} for k in thresholds}
    at: dict[str, dict[str, Any]] = {}
    if rules.average == "items":
        # All captions are scored once, also those with a small IoU; the mask of each k is applied to their scores.
        scores = _score(objects, captions, rules, captions, java)
        at = {str(k): _masked_scores(scores, passed[k], len(captions)) for k in thresholds}
    else:
        for k in thresholds:
            scores = _score(objects, captions, rules, passed[k], java)
            at[str(k)] = {"passed": len(passed[k]), **vars(scores)}
    return {"protocol": protocol, "objects": len(objects), "missing": len(ious.keys() - captions.keys()), "at": at}


def caption_terms(result: ProtocolResult, average: str = "corpus") -> list[ItemTerms]:
    """``Protocol.item_terms``: the metrics that are means of items; for ``scan2cap_benchmark`` those are all.

    Args:
        result: result of `score_scan2cap`.
        average: ``Scan2CapRules.average`` of the protocol.
    """
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for k, at in result["at"].items():
        items = at["items"] if average == "corpus" else at["items_before_mask"]
        for key, item in items.items():
            counted = 1 if average == "corpus" else at["mask"][key]
            own = sums.setdefault(key, {})
            for name in ITEM_MEANS if average == "corpus" else PAPER_METRICS:
                if item[name] is not None:
                    own[f"{name}@{k}"] = item[name] * counted, 1.0
    return [ItemTerms((), own) for own in sums.values()]


def _score(
    objects: Sequence[DescribedObject],
    captions: Mapping[str, Caption],
    rules: Scan2CapRules,
    counted: Collection[str],
    java: Java | None,
) -> CaptionScores:
    """Caption scores of all objects: the captions of those in `counted`, the placeholder for all others."""
    references = {annotated.key: rules.reference(annotated) for annotated in objects}
    candidates = {key: rules.candidate(captions[key]) if key in counted else rules.placeholder for key in references}
    return score_captions(references, candidates, rules.tokenizer, java)


def _masked_scores(scores: CaptionScores, passed: Collection[str], predictions: int) -> dict[str, Any]:
    """Scores of ``scan2cap_benchmark`` at one threshold: item scores of failures are set to 0, then averaged.

    recall = sum(score x mask) / objects, precision = sum(score x mask) / predictions, F1 is their harmonic mean. METEOR
    is the mean of items here, unlike in all other protocols. The reference's Hungarian matching of proposals with
    objects is not needed: every caption has the id of its object.

    Args:
        scores: scores of all captions, with a placeholder for objects without one.
        passed: keys of the captions with a sufficient IoU.
        predictions: number of captions.
    """
    mask = {key: int(key in passed) for key in scores.items}
    recall = _masked(scores, mask, len(mask))
    precision = _masked(scores, mask, predictions)
    return {
        "passed": len(passed),
        "corpus": recall,
        "recall": recall,
        "precision": precision,
        "f1": {name: _harmonic(precision[name], recall[name]) for name in CAPTION_METRICS},
        "mask": mask,
        "items_before_mask": scores.items,
        "candidates": scores.candidates,
        "references": scores.references,
        "not_computed": scores.not_computed,
    }


def _masked(scores: CaptionScores, mask: Mapping[str, int], count: int) -> dict[str, MetricValue]:
    """Metric -> sum(score x mask) / count; None if it was not computed."""
    means: dict[str, MetricValue] = {}
    for name in CAPTION_METRICS:
        values = [(item[name], mask[key]) for key, item in scores.items.items()]
        # One item without a score (METEOR without Java) makes the mean None: a mean of the others would be misleading.
        masked = [value * passed for value, passed in values if value is not None]
        means[name] = sum(masked) / max(count, 1) if len(masked) == len(values) else None
    return means


def _harmonic(first: MetricValue, second: MetricValue) -> MetricValue:
    if first is None or second is None:
        return None
    return 2 * first * second / (first + second) if first + second else 0.0


def _iou(annotated: DescribedObject, caption: Caption | None, rules: Scan2CapRules) -> float:
    """IoU that gates a caption; 0 without a caption or without a box."""
    if caption is None:
        return 0.0
    if caption.iou is not None:
        return caption.iou
    return 0.0 if caption.box is None else aabb_iou(caption.box, annotated.box, rules.precision)


class DescribedTarget(FrozenModel):
    """Fields of a target that Scan2Cap's protocols read."""

    box: Box9
    object_id: int | str
    object_name: str
    described: Box6 | None


class Scan2CapRecord(RecordFields):
    """Fields of a record that Scan2Cap's protocols read."""

    target: DescribedTarget
    references: list[ReferenceFields]
    iou: FiniteFloat | None = None


def _inputs(records: Sequence[AnswerRecord], _: Proposals | None, protocol: str) -> tuple[Any, ...]:
    """Objects and captions, as arguments of `score_scan2cap`.

    Raises:
        ValueError: the protocol compares words, and a reference has none.
    """
    rules = SCAN2CAP_RULES[protocol]
    objects = [_described_object(record) for record in records]
    # Checked here, because an empty list of words would be scored as an empty reference without an error.
    if rules.reference_words:
        raise_with_first(
            [annotated.key for annotated in objects if not all(annotated.tokens)],
            f"annotated objects have references without the words that scan2cap/{protocol} compares",
            "; prepare the data set from a ScanRefer file with the field 'token'",
        )
    captions = {
        annotated.key: _caption(record, rules)
        for record, annotated in zip(records, objects, strict=True)
        if record["text"] is not None
    }
    return objects, captions


def _described_object(record: AnswerRecord) -> DescribedObject:
    target = record["target"]
    return DescribedObject(
        key=f"{record['scene_id']}|{target['object_id']}|{target['object_name']}",
        descriptions=tuple(reference["text"] for reference in record["references"]),
        tokens=tuple(tuple(reference["words"]) for reference in record["references"]),
        box=tuple(enclosing_box(target["box"])),
    )


def _caption(record: AnswerRecord, rules: Scan2CapRules) -> Caption:
    # The gate is the IoU of the box in the prompt, or the IoU in VG-LLM's files ("iou").
    # Generated captions are free text; Scan2Cap's own protocols compare words as ScanRefer's file splits them.
    words = tuple(split_words(record["text"])) if rules.caption_words else None
    box = record["target"]["described"]
    return Caption(record["text"], None if box is None else tuple(box), words, record.get("iou"))


for _name, _rules in SCAN2CAP_RULES.items():
    register_protocol(
        Protocol(
            name=f"scan2cap/{_name}",
            description=_rules.description,
            source=_rules.source,
            score=partial(score_scan2cap, protocol=_name),
            metrics={f"{metric}@{k}": ("at", str(k), "corpus", metric) for k in THRESHOLDS for metric in PAPER_METRICS},
            best_by="CIDEr@0.5",
            inputs=partial(_inputs, protocol=_name),
            record_model=Scan2CapRecord,
            default=_name == "vgllm",
            item_terms=partial(caption_terms, average=_rules.average),
        )
    )
