"""Geometric causality of a model: answers under all interventions that its encoder allows, and the measures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.bootstrap import Ratio, SceneBootstrap
from w2r2_ds.diagnostics.causality import measure_causality
from w2r2_ds.diagnostics.interventions import INTERVENTIONS, Intervention, compare_answers, not_applicable
from w2r2_ds.evaluation.conditions import Condition
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.types.geometry import GeometrySpec

REPLACED = ("zero", "shuffle")
"""Conditions whose geometry is replaced without an expected answer, for any encoder."""


def applicable(geometry: GeometrySpec, box_format: str | None) -> tuple[list[Intervention], dict[str, str]]:
    """The interventions that can be measured, and kind -> reason for the others.

    Args:
        geometry: input of the geometry encoder.
        box_format: coordinates of the boxes in the answers; None if answers are not boxes.
    """
    reasons = {each.kind: not_applicable(each.kind, geometry, box_format) for each in INTERVENTIONS}
    usable = [each for each in INTERVENTIONS if not reasons[each.kind]]
    return usable, {kind: reason for kind, reason in reasons.items() if reason}


def answer_interventions(
    interventions: Sequence[Intervention], answer: Callable[[Condition], Sequence[AnswerRecord]]
) -> dict[Intervention, Sequence[AnswerRecord]]:
    """Answers under every intervention. Collective: every rank calls it with the same interventions.

    Args:
        interventions: from `applicable`.
        answer: condition -> records of the samples; empty on ranks other than 0.
    """
    return {each: answer(each.condition()) for each in interventions}


def causality_results(
    rows: Mapping[str, Sequence[AnswerRecord]],
    after: Mapping[Intervention, Sequence[AnswerRecord]],
    not_evaluated: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The key ``causality`` of the results file, which docs/guides/diagnose.md describes.

    Args:
        rows: condition -> records; ``fused`` and those of `REPLACED` that were evaluated.
        after: intervention -> records of the first samples of ``fused``.
        not_evaluated: kind of intervention -> why it is not measured.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
    """
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(each.kind for each in after):
        own = {each: records for each, records in after.items() if each.kind == kind}
        samples = len(next(iter(own.values())))
        measures = measure_causality(compare_answers(rows["fused"][:samples], own), resamples, seed)
        kinds[kind] = {"amounts": [each.amount for each in own], "samples": samples, **measures}
    replaced = {
        name: _unchanged(rows["fused"], records, resamples, seed) for name, records in rows.items() if name in REPLACED
    }
    return {"interventions": kinds, "replaced": replaced, "not_evaluated": dict(not_evaluated)}


def _unchanged(
    before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], resamples: int, seed: int
) -> dict[str, Any]:
    """Share of answers whose text stays the same, with its interval."""
    same = [float(one["text"] == other["text"]) for one, other in zip(before, after, strict=True)]
    bootstrap = SceneBootstrap([str(record["scene_id"]) for record in before], resamples, seed)
    return {"samples": len(same), "unchanged": asdict(bootstrap.score(Ratio(np.array(same), np.ones(len(same)))))}
