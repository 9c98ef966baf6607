"""Decide by a rule that is fixed before the runs whether an arm replaces the default.

The rule of docs/research/study.md. Every arm is compared with the baseline on one primary outcome, the score per
question of an evaluation, paired by start (pretrained weights), seed and question. An arm is

    undecided  it, or the baseline, has too few starts, seeds, questions or scenes: no test is made
    inactive   its push term is gated by the hinge, which was active in too few training samples: the arm was not tried
    tested     the mean difference has an interval and a p-value, corrected for all tested arms (Holm)

A tested arm is better if p is small, the difference is large enough and positive for every start, the score on
unshifted data does not fall, and the arm exceeds the control, which spends the time of a push term on more steps
without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from w2r2_ds.diagnostics.ablation.statistics import Comparison, holm, over_seeds_and_scenes

UNDECIDED, INACTIVE, TESTED = "undecided", "inactive", "tested"

Key = tuple[str, int]
"""Start and seed of a run."""


@dataclass(frozen=True)
class Rule:
    """Numbers of the rule.

    Attributes:
        starts: fewest pretrained starts of an arm.
        seeds: fewest seeds of every start.
        questions: fewest questions of the primary outcome.
        scenes: fewest scenes of these questions.
        active: smallest mean share of training samples in which the hinge of a gated push term is active.
        p: largest corrected p-value of an arm that is better.
        effect: smallest difference of the primary outcome of an arm that is better.
        iid_loss: largest loss of the score on unshifted data of an arm that is better.
        tie: arms whose differences are at most this far below the largest one are equal; the fastest of them is chosen.
    """

    starts: int = 2
    seeds: int = 5
    questions: int = 600
    scenes: int = 50
    active: float = 0.5
    p: float = 0.05
    effect: float = 0.03
    iid_loss: float = 0.03
    tie: float = 0.01


@dataclass(frozen=True)
class ArmRuns:
    """The finished runs of one arm.

    Attributes:
        name: name of the arm.
        primary: (start, seed) -> ``[questions]`` float64 scores of the primary outcome.
        iid: (start, seed) -> ``[questions]`` float64 scores on unshifted data.
        step_seconds: mean seconds of a training step.
        is_push_term: whether the arm differs from the baseline in its push term only, so that it could be the default.
        active: mean share of training samples in which the hinge was active; None for an arm without hinge.
        mu: threshold of the hinge. If the hinge is inactive and mu is above 0, the arm has to be run with a lower one.
    """

    name: str
    primary: Mapping[Key, np.ndarray]
    iid: Mapping[Key, np.ndarray]
    step_seconds: float
    is_push_term: bool = False
    active: float | None = None
    mu: float = 0.0


@dataclass(frozen=True)
class ArmResult:
    """The result of the rule for one arm.

    Attributes:
        name: name of the arm.
        state: ``undecided``, ``inactive`` or ``tested``.
        reason: why it is not tested, or which conditions of a better arm it does not meet; empty for a better arm.
        difference: difference of the primary outcome to the baseline; None unless tested.
        p_holm: its p, corrected for all tested arms.
        by_start: start -> mean difference of the primary outcome.
        iid: mean difference on unshifted data.
        better: whether it meets all conditions.
    """

    name: str
    state: str
    reason: str = ""
    difference: Comparison | None = None
    p_holm: float | None = None
    by_start: Mapping[str, float] | None = None
    iid: float | None = None
    better: bool = False


@dataclass(frozen=True)
class Decision:
    """The decision about the default push term.

    Attributes:
        results: one per arm other than the baseline, in their order.
        decided: False if the rule cannot be applied yet.
        default: name of the arm that becomes the default; None if the default stays.
        reason: why.
    """

    results: Sequence[ArmResult]
    decided: bool
    default: str | None
    reason: str


STUDY = Rule()
"""The rule of docs/research/study.md."""


def decide(
    baseline: ArmRuns, arms: Sequence[ArmRuns], scenes: Sequence[str], control: str, rule: Rule = STUDY
) -> Decision:
    """Apply the rule.

    Args:
        baseline: runs without a push term.
        arms: runs of all other arms, with the control.
        scenes: scene of every question of the primary outcome.
        control: name of the control, an arm of about equal compute without a push term.
        rule: numbers of the rule.

    Raises:
        ValueError: there is no arm with the name of the control.
    """
    if control not in [arm.name for arm in arms]:
        raise ValueError(f"there is no control arm {control!r}; the arms are {', '.join(arm.name for arm in arms)}.")
    results = _corrected([_test(arm, baseline, scenes, rule) for arm in arms])
    of_control = next(each for each in results if each.name == control)
    if of_control.state != TESTED:
        return Decision(results, False, None, f"the control {control} is {of_control.state}: {of_control.reason}")
    results = [_with_conditions(each, of_control, rule) for each in results]
    terms = {arm.name: arm for arm in arms if arm.is_push_term}
    own = [each for each in results if each.name in terms]
    # With mu = 0 nothing is left to try: an inactive term is then reported as such.
    missing = [each for each in own if each.state == UNDECIDED or (each.state == INACTIVE and terms[each.name].mu > 0)]
    if missing:
        reasons = "; ".join(f"{each.name} ({each.reason})" for each in missing)
        return Decision(results, False, None, f"push terms without a test: {reasons}")
    better = [each for each in own if each.better]
    if not better:
        return Decision(results, True, None, "no push term is better than the baseline; the default stays")
    highest = max(_mean(each) for each in better)
    tied = [each for each in better if _mean(each) >= highest - rule.tie]
    chosen = min(tied, key=lambda each: terms[each.name].step_seconds)
    return Decision(results, True, chosen.name, f"better: {', '.join(each.name for each in better)}")


def _test(arm: ArmRuns, baseline: ArmRuns, scenes: Sequence[str], rule: Rule) -> ArmResult:
    """Test one arm; p is not corrected yet, and `better` not known."""
    common = sorted(key for key in arm.primary if key in baseline.primary and key in arm.iid and key in baseline.iid)
    if reason := _too_few(common, scenes, rule):
        return ArmResult(arm.name, UNDECIDED, reason)
    if arm.active is not None and arm.active < rule.active:
        return ArmResult(arm.name, INACTIVE, f"hinge active in {arm.active:.0%} of the samples, not {rule.active:.0%}")
    differences = np.stack([arm.primary[key] - baseline.primary[key] for key in common])  # [runs, questions]
    difference = over_seeds_and_scenes(differences, scenes)
    if difference is None:
        return ArmResult(arm.name, UNDECIDED, "all runs have the same difference, so its spread is unknown")
    starts = np.array([start for start, _ in common])
    by_start = {str(start): float(differences[starts == start].mean()) for start in dict.fromkeys(starts.tolist())}
    iid = float(np.mean([arm.iid[key].mean() - baseline.iid[key].mean() for key in common]))
    return ArmResult(arm.name, TESTED, "", difference, difference.p, by_start, iid)


def _too_few(common: Sequence[Key], scenes: Sequence[str], rule: Rule) -> str:
    """Why there are too few runs or questions for a test; empty if there are enough."""
    seeds = {start: sum(each == start for each, _ in common) for start, _ in common}
    enough = [start for start, count in seeds.items() if count >= rule.seeds]
    if len(enough) < rule.starts or len(enough) < len(seeds):
        counts = ", ".join(f"{start}: {count}" for start, count in seeds.items()) or "none"
        return f"seeds with the baseline {counts}; {rule.starts} starts with {rule.seeds} each are needed"
    for name, count, needed in (("questions", len(scenes), rule.questions), ("scenes", len(set(scenes)), rule.scenes)):
        if count < needed:
            return f"{count} {name}; {needed} are needed"
    return ""


def _corrected(results: Sequence[ArmResult]) -> list[ArmResult]:
    """Results with p corrected for all tested arms."""
    tested = [each for each in results if each.p_holm is not None]
    adjusted = dict(
        zip(
            [each.name for each in tested],
            holm([each.p_holm for each in tested if each.p_holm is not None]),
            strict=True,
        )
    )
    return [replace(each, p_holm=adjusted.get(each.name)) for each in results]


def _with_conditions(result: ArmResult, control: ArmResult, rule: Rule) -> ArmResult:
    """A result with the conditions of a better arm."""
    if result.state != TESTED:
        return result
    assert result.p_holm is not None and result.by_start is not None and result.iid is not None, "it is tested"
    difference = _mean(result)
    met = {
        f"p (Holm) {result.p_holm:.3f} is not below {rule.p:g}": result.p_holm < rule.p,
        f"difference {difference:+.3f} is below {rule.effect:g}": difference >= rule.effect,
        "the difference is not positive for every start": min(result.by_start.values()) > 0,
        f"unshifted score {result.iid:+.3f}": result.iid >= -rule.iid_loss,
        f"not above the control ({_mean(control):+.3f})": result is control or difference > _mean(control),
    }
    reason = "; ".join(text for text, holds in met.items() if not holds)
    return replace(result, reason=reason, better=not reason)


def _mean(result: ArmResult) -> float:
    """Difference of the primary outcome of a tested arm."""
    assert result.difference is not None, "it is tested"
    return result.difference.mean
