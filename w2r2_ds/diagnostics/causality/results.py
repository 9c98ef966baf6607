"""Geometric causality of a model: answers under all interventions that its encoder allows, and the measures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w2r2_ds.diagnostics.bootstrap import Ratio, SceneBootstrap
from w2r2_ds.diagnostics.causality.interventions import INTERVENTIONS, Intervention, compare_answers, not_applicable
from w2r2_ds.diagnostics.causality.measures import measure_causality
from w2r2_ds.diagnostics.causality.paired_rooms import PairedRooms, compare_with_pairs
from w2r2_ds.diagnostics.causality.removed_frame import WHICH, Which, condition, movement, rays_on_target
from w2r2_ds.evaluation.conditions import Condition
from w2r2_ds.evaluation.protocols.records import AnswerRecord
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample

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


@dataclass(frozen=True)
class CausalityAnswers:
    """Answers of the first samples of a set to other geometry; empty on ranks other than 0.

    Attributes:
        changed: intervention -> records.
        removed: which frame's geometry was removed -> records.
        paired: shifted split whose geometry was used -> records.
        not_evaluated: kind of intervention -> why it is not measured.
    """

    changed: Mapping[Intervention, Sequence[AnswerRecord]]
    removed: Mapping[Which, Sequence[AnswerRecord]]
    paired: Mapping[PairedRooms, Sequence[AnswerRecord]]
    not_evaluated: Mapping[str, str]


def answer_interventions(
    geometry: GeometrySpec,
    box_format: str | None,
    pairs: Sequence[PairedRooms],
    answer: Callable[[Condition], Sequence[AnswerRecord]],
) -> CausalityAnswers:
    """Answers under every intervention. Collective: every rank calls it with the same arguments.

    Args:
        geometry: input of the geometry encoder.
        box_format: coordinates of the boxes in the answers; None if answers are not boxes.
        pairs: shifted splits whose geometry replaces that of the samples.
        answer: condition -> records of the samples; empty on ranks other than 0.
    """
    usable, reasons = applicable(geometry, box_format)
    # Like a scale, a missing frame has one meaning in any coordinates.
    removable = "scale" not in reasons
    if not removable:
        reasons["removed_frame"] = reasons["scale"]
    return CausalityAnswers(
        {each: answer(each.condition()) for each in usable},
        {which: answer(condition(which)) for which in WHICH} if removable else {},
        {each: answer(each.condition()) for each in pairs},
        reasons,
    )


def causality_results(
    rows: Mapping[str, Sequence[AnswerRecord]],
    answers: CausalityAnswers,
    samples: Sequence[Sample],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The key ``causality`` of the results file, which docs/guides/diagnose.md describes.

    Args:
        rows: condition -> records; ``fused`` and those of `REPLACED` that were evaluated.
        answers: from `answer_interventions`, of the first samples of ``fused``.
        samples: these samples.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
    """
    before = rows["fused"][: len(samples)]
    decimals = min(sample.decimals for sample in samples)
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(each.kind for each in answers.changed):
        own = {each: records for each, records in answers.changed.items() if each.kind == kind}
        measures = measure_causality(compare_answers(before, own), resamples, seed, decimals)
        kinds[kind] = {"amounts": [each.amount for each in own], "samples": len(samples), **measures}
    rays = [rays_on_target(sample) for sample in samples] if answers.removed else []
    removed = {
        which: movement(before, records, rays, which, resamples, seed) for which, records in answers.removed.items()
    }
    paired = {
        each.shift: {"data": str(each.folder)}
        | measure_causality(compare_with_pairs(before, records, samples, each.samples), resamples, seed, decimals)
        for each, records in answers.paired.items()
    }
    replaced = {
        name: _unchanged(rows["fused"], records, resamples, seed) for name, records in rows.items() if name in REPLACED
    }
    return {
        "interventions": kinds,
        "removed_frame": removed,
        "paired": paired,
        "replaced": replaced,
        "not_evaluated": dict(answers.not_evaluated),
    }


def _unchanged(
    before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], resamples: int, seed: int
) -> dict[str, Any]:
    """Share of answers whose text stays the same, with its interval."""
    same = [float(one["text"] == other["text"]) for one, other in zip(before, after, strict=True)]
    bootstrap = SceneBootstrap([str(record["scene_id"]) for record in before], resamples, seed)
    return {"samples": len(same), "unchanged": asdict(bootstrap.score(Ratio(np.array(same), np.ones(len(same)))))}
