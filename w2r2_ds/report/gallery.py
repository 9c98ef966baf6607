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
        scores: geometry -> score, in 0..1.
    """

    sample: Sample
    records: Mapping[str, dict[str, Any]]
    scores: Mapping[str, float]


def answered_samples(group: EvaluationGroup, config: RunConfig) -> list[Answered]:
    """All samples that were answered with geometry, with the scores of every geometry.

    A sample's score is its IoU, or the first metric that the protocol has per sample.

    Raises:
        ValueError: a data set is missing, or was prepared again with other samples.
    """
    evaluations = {name: group.by_geometry[name] for name in ("fused", "zero") if name in group.by_geometry}
    records = {name: evaluation.records() for name, evaluation in evaluations.items()}
    records = {name: found for name, found in records.items() if found}
    if "fused" not in records:
        return []
    scores = {name: _scores(found, group.by_geometry[name].protocols) for name, found in records.items()}
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
        )
        for key in records["fused"]
    ]


def _scores(records: Mapping[str, dict[str, Any]], protocols: Mapping[str, Any]) -> dict[str, float]:
    """Sample id -> score by the first protocol that scores single samples."""
    for protocol in protocols:
        try:
            items = score_records(list(records.values()), [protocol], items=True)[protocol].get("items", {})
        except ValueError as error:  # a protocol that needs detected boxes
            logger.warning("%s: no scores per sample (%s)", protocol, error)
            continue
        found = {key: _score(items[key]) for key in records if key in items}
        scores = {key: score for key, score in found.items() if score is not None}
        if scores:
            return scores
    return {}


def _score(item: Mapping[str, Any]) -> float | None:
    if "iou" in item:
        return float(item["iou"])
    return next((float(value) for value in item.values() if isinstance(value, int | float)), None)


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
