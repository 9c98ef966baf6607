"""Table 1 of the W2R2 paper: scores with and without geometry, per protocol and group, with intervals over scenes.

Every row is one set of answers to the same samples, of a model under some condition or of a random guess. All rows are
scored by the same protocols, so they differ in the answers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.bootstrap import Estimate, Ratio, SceneBootstrap
from w2r2_ds.evaluation.metrics.captions import MetricValue
from w2r2_ds.evaluation.protocols.records import AnswerRecord, Proposals
from w2r2_ds.evaluation.protocols.registry import ItemTerms, Protocol, ProtocolResult, find_protocol
from w2r2_ds.evaluation.scoring import check_records, score_records

OVERALL = "overall"
"""Group of all samples."""
NOT_A_RATIO = "a score of the whole corpus, which is not a mean over samples"


@dataclass(frozen=True)
class Row:
    """One set of answers.

    Attributes:
        name: key of the row in the results.
        label: text in the table.
        draws: records of all samples, in the same order in every row; more than one list for an answer that is drawn
            at random, whose scores are averaged.
        predictions: file of the answers; empty for a random guess.
    """

    name: str
    label: str
    draws: Sequence[Sequence[AnswerRecord]]
    predictions: str = ""


@dataclass(frozen=True)
class ScoredRow:
    """The scores of a row by one protocol.

    Attributes:
        printed: metric -> score of all samples, the mean over draws; None if it was not computed.
        parsed: share of answers that can be parsed.
        groups: groups of every sample, without `OVERALL`.
        ratios: metric -> terms of every sample, for the metrics that are ratios of sums.
        reasons: metric -> why its score is None.
    """

    printed: Mapping[str, MetricValue]
    parsed: float
    groups: Sequence[tuple[str, ...]]
    ratios: Mapping[str, Ratio]
    reasons: Mapping[str, str]


def make_table(
    rows: Sequence[Row],
    protocols: Sequence[str],
    proposals: Proposals | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of all rows, and differences of all pairs of rows, with 95 % intervals.

    Args:
        rows: at least one row.
        protocols: full names of protocols.
        proposals: detected boxes, for protocols that need them.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        ``rows``, ``cells`` and ``differences``, as docs/guides/diagnose.md describes them.

    Raises:
        ValueError: the rows have different samples, or a protocol cannot score them.
    """
    records = rows[0].draws[0]
    check_records(records)
    for row in rows:
        _check_same_samples(rows[0], row)
    scenes = np.array([record["scene_id"] for record in records], dtype=str)
    cells: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    parsed: dict[str, dict[str, float]] = {row.name: {} for row in rows}
    for name in protocols:
        scored = {row.name: score_row(row, find_protocol(name), proposals) for row in rows}
        for row in rows:
            parsed[row.name][name] = scored[row.name].parsed
        for group, members in _group_members(scored[rows[0].name].groups, len(records)).items():
            bootstrap = SceneBootstrap(scenes[members].tolist(), resamples, seed)
            about = {"protocol": name, "group": group}
            counts = {"samples": int(members.sum()), "scenes": bootstrap.scenes}
            for metric in find_protocol(name).metrics:
                for row_name, each in scored.items():
                    if metric in each.ratios or group == OVERALL:
                        estimate = _cell(each, metric, members, bootstrap)
                        cells.append({**about, "metric": metric, "row": row_name, **estimate, **counts})
                for first, second in combinations(scored, 2):
                    pair = [scored[row_name].ratios.get(metric) for row_name in (first, second)]
                    if None not in pair:
                        kept = [_selected(ratio, members) for ratio in pair if ratio is not None]
                        change = asdict(bootstrap.difference(kept[0], kept[1]))
                        differences.append({**about, "metric": metric, "row": first, "minus": second, **change})
    described = [
        {
            "row": row.name,
            "label": row.label,
            "predictions": row.predictions,
            "draws": len(row.draws),
            "parsed": parsed[row.name],
        }
        for row in rows
    ]
    return {"rows": described, "cells": cells, "differences": differences}


def score_row(row: Row, protocol: Protocol, proposals: Proposals | None = None) -> ScoredRow:
    """Score the answers of a row by one protocol, the mean over its draws."""
    results = [score_records(records, [protocol.name], proposals, items=True)[protocol.name] for records in row.draws]
    terms = [protocol.item_terms(result) if protocol.item_terms else [] for result in results]
    assert all(len(each) in (0, len(row.draws[0])) for each in terms), "one term per record"
    printed = [protocol.printed(result) for result in results]
    scored = ScoredRow(
        printed={metric: _mean([values[metric] for values in printed]) for metric in protocol.metrics},
        parsed=sum(result["parsed"] for result in results) / len(results),
        groups=[item.groups for item in terms[0]],
        ratios=_ratios(terms, list(protocol.metrics)),
        reasons=_reasons(results[0], protocol),
    )
    if len(results) == 1:  # the terms must reproduce the score of the protocol
        for metric, ratio in scored.ratios.items():
            score = scored.printed[metric]
            assert score is None or math.isclose(ratio.value, score, rel_tol=0, abs_tol=1e-9), (protocol.name, metric)
    return scored


def _group_members(groups: Sequence[tuple[str, ...]], count: int) -> dict[str, np.ndarray]:
    """Group -> mask of its samples, bool ``[samples]``; the first is `OVERALL`, the others are in alphabetical order.

    Args:
        groups: groups of every sample; empty if the protocol has none.
        count: number of samples.
    """
    members = {OVERALL: np.ones(count, dtype=bool)}
    names = sorted({name for own in groups for name in own})
    return members | {name: np.array([name in own for own in groups], dtype=bool) for name in names}


def _ratios(terms: Sequence[Sequence[ItemTerms]], metrics: Sequence[str]) -> dict[str, Ratio]:
    """Metric -> terms of every record, averaged over draws; metrics without terms of all records are skipped."""
    ratios = {}
    for metric in metrics:
        if terms[0] and all(metric in item.sums for draw in terms for item in draw):
            # [draws, records, 2] -> mean over the draws
            sums = np.array([[item.sums[metric] for item in draw] for draw in terms], dtype=np.float64).mean(axis=0)
            if sums[:, 1].any():  # else there is nothing to count, and the protocol's score is None
                ratios[metric] = Ratio(sums[:, 0], sums[:, 1])
    return ratios


def _cell(scored: ScoredRow, metric: str, members: np.ndarray, bootstrap: SceneBootstrap) -> dict[str, Any]:
    """``value``, ``low``, ``high``, ``reason`` of one score."""
    if metric in scored.ratios:
        return asdict(bootstrap.score(_selected(scored.ratios[metric], members)))
    value = scored.printed[metric]
    if value is None:
        return {"value": None, "low": None, "high": None, "reason": scored.reasons.get(metric, "not computed")}
    return asdict(Estimate(value, reason=NOT_A_RATIO))


def _selected(ratio: Ratio, members: np.ndarray) -> Ratio:
    return Ratio(ratio.numerators[members], ratio.denominators[members])


def _reasons(result: ProtocolResult, protocol: Protocol) -> dict[str, str]:
    """Metric -> why its score is None; of Scan2Cap, whose metrics are named ``m@k``, from every k."""
    reasons = dict(result.get("not_computed", {}))
    for k, at in result.get("at", {}).items():
        reasons |= {f"{name}@{k}": reason for name, reason in at.get("not_computed", {}).items()}
    return {metric: reason for metric, reason in reasons.items() if metric in protocol.metrics}


def _mean(values: Sequence[MetricValue]) -> MetricValue:
    """The mean; None if one value is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _check_same_samples(first: Row, row: Row) -> None:
    """Raise ValueError if a row has other samples than the first one, or another order."""
    ids = [record["id"] for record in first.draws[0]]
    for records in row.draws:
        other = [record["id"] for record in records]
        if other != ids:
            differing = sorted(set(ids) ^ set(other)) or [a for a, b in zip(ids, other, strict=True) if a != b]
            raise ValueError(
                f"The answers of {row.label!r} are of other samples, or in another order, than those of "
                f"{first.label!r}; the first is {differing[0]!r}."
            )
