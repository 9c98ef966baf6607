"""Samples of a report's gallery: best, worst, and those whose answer the geometry changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.evaluation.protocols.records import answer_world_box
from w2r2_ds.evaluation.protocols.registry import find_protocol
from w2r2_ds.evaluation.scoring import score_records
from w2r2_ds.report.collect import EvaluationGroup
from w2r2_ds.types.sample import Sample

logger = logging.getLogger(__name__)

KINDS = {
    "helped": "geometry helps most",
    "best": "best with geometry",
    "worst": "worst with geometry",
    "hurt": "geometry hurts most",
}
"""Why a sample is shown, in the order of the page."""


@dataclass(frozen=True)
class Answered:
    """One sample with its answers and scores.

    Attributes:
        sample: the sample.
        records: geometry -> answer record.
        scores: geometry -> score.
        measure: name of the score, such as ``IoU``; empty without scores.
    """

    sample: Sample
    records: Mapping[str, dict[str, Any]]
    scores: Mapping[str, float]
    measure: str = ""


def answered_samples(group: EvaluationGroup, config: RunConfig) -> list[Answered]:
    """All samples that were answered with geometry, with the scores of every geometry.

    A sample's score is its IoU, or another measure that the protocol has per sample (see `_scores`).

    Raises:
        ValueError: a data set is missing, or was prepared again with other samples.
    """
    evaluations = {name: group.by_geometry[name] for name in ("fused", "zero") if name in group.by_geometry}
    records = {name: evaluation.records() for name, evaluation in evaluations.items()}
    records = {name: found for name, found in records.items() if found}
    if "fused" not in records:
        return []
    measure, scores = "", dict[str, dict[str, float]]()
    for protocol in evaluations["fused"].protocols:  # the first one that has scores of single samples
        by_geometry = {name: _scores(found, protocol) for name, found in records.items()}
        measure, fused_scores = by_geometry["fused"]
        if fused_scores:
            scores = {name: found for name, (_, found) in by_geometry.items()}
            break
    samples = {}
    for folder in group.data:
        for sample in PreparedSet(folder, config.data.root):
            if sample.id in records["fused"]:
                samples[sample.id] = sample
    missing = [key for key in records["fused"] if key not in samples]
    if missing:
        raise ValueError(
            f"{', '.join(group.data)} has no sample {missing[0]}, which was answered; was it prepared again?"
        )
    return [
        Answered(
            samples[key],
            {name: found[key] for name, found in records.items() if key in found},
            {name: found[key] for name, found in scores.items() if key in found},
            measure,
        )
        for key in records["fused"]
    ]


def _scores(records: Mapping[str, dict[str, Any]], protocol: str) -> tuple[str, dict[str, float]]:
    """Name of the measure of single samples, and sample id -> score; empty if the protocol has none.

    The measure is the IoU, or a metric that is a ratio of sums over samples, if possible the protocol's main one: CIDEr
    of a caption, F1 of a scene.
    """
    try:
        result = score_records(list(records.values()), [protocol], items=True)[protocol]
    except ValueError as error:  # a protocol that needs detected boxes
        logger.warning("%s: no scores per sample (%s)", protocol, error)
        return "", {}
    items = result.get("items")
    if isinstance(items, Mapping) and all("iou" in items.get(key, ()) for key in records):
        return "IoU", {key: float(items[key]["iou"]) for key in records}
    found = find_protocol(protocol)
    terms = found.item_terms(result) if found.item_terms else []
    for metric in (found.best_by, *found.metrics):
        if terms and all(metric in term.sums for term in terms):
            sums = {key: term.sums[metric] for key, term in zip(records, terms, strict=True)}
            # A scene without objects and answers has no F1.
            return metric, {key: top / bottom for key, (top, bottom) in sums.items() if bottom}
    return "", {}


def choose(answered: Sequence[Answered], count: int) -> list[tuple[str, Answered]]:
    """Choose samples of every kind, `count` in total and each at most once; only samples with a score.

    Args:
        answered: all samples.
        count: largest number of chosen samples.
    """
    scored = [each for each in answered if "fused" in each.scores]
    gains = {id(each): each.scores["fused"] - each.scores.get("zero", each.scores["fused"]) for each in scored}
    by_fused = sorted(scored, key=lambda each: (-each.scores["fused"], each.sample.id))
    by_gain = sorted(scored, key=lambda each: (-gains[id(each)], each.sample.id))
    orders = {
        "helped": [each for each in by_gain if gains[id(each)] > 0],
        "best": by_fused,
        "worst": by_fused[::-1],
        "hurt": [each for each in by_gain[::-1] if gains[id(each)] < 0],
    }
    chosen: dict[str, list[Answered]] = {kind: [] for kind in KINDS}
    taken: set[str] = set()
    while len(taken) < min(count, len(scored)):  # in turn, so that every kind has its share
        for kind, order in orders.items():
            following = next((each for each in order if each.sample.id not in taken), None)
            if following is not None and len(taken) < count:
                chosen[kind].append(following)
                taken.add(following.sample.id)
    return [(kind, each) for kind, found in chosen.items() for each in found]


def boxes_of(answered: Answered) -> dict[str, np.ndarray]:
    """``true``, ``fused``, ``zero`` -> world box ``[6]`` or ``[9]`` (centre, size, angles); those that exist."""
    boxes = {}
    if answered.sample.target is not None:
        boxes["true"] = np.asarray(answered.sample.target.box)
    for name, record in answered.records.items():
        box = answer_world_box(record) if "form" in record else None
        if box is not None:
            boxes[name] = np.array(box)
    return boxes
