"""The rule of the study on made-up scores, whose right decision is known."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from w2r2_ds.diagnostics.ablation.decision import (
    INACTIVE,
    STUDY,
    TESTED,
    UNDECIDED,
    ArmResult,
    ArmRuns,
    Decision,
    Key,
    decide,
)

SCENES = [f"scene{number // 10:04d}_00" for number in range(600)]
STARTS = ("a", "b")
KEYS = [(start, seed) for start in STARTS for seed in range(5)]
CONTROL = "more steps"


def runs(
    name: str, share: float, keys: Iterable[Key] = KEYS, iid: float = 0.6, seconds: float = 1.0, **more: object
) -> ArmRuns:
    """An arm with this share of right answers, which varies a little between runs and with the questions."""
    rng = np.random.default_rng(sum(map(ord, name)))
    difficulty = np.random.default_rng(0).random(600)

    def scores(level: float) -> np.ndarray:
        return (difficulty + rng.normal(0, 0.03, 600) < level + rng.normal(0, 0.005)).astype(float)

    found = {key: (scores(share), scores(iid)) for key in keys}
    options = {"is_push_term": True} | more
    return ArmRuns(
        name,
        {key: one for key, (one, _) in found.items()},
        {key: other for key, (_, other) in found.items()},
        seconds,
        **options,  # type: ignore[arg-type]
    )


BASELINE = runs("none", 0.30)
MORE = runs(CONTROL, 0.31, is_push_term=False)


def decided(*arms: ArmRuns, baseline: ArmRuns = BASELINE, scenes: list[str] = SCENES) -> Decision:
    return decide(baseline, [*arms, MORE], scenes, CONTROL)


def result(decision: Decision, name: str) -> ArmResult:
    (found,) = [each for each in decision.results if each.name == name]
    return found


def test_the_better_arm_becomes_the_default() -> None:
    decision = decided(runs("margin", 0.42), runs("poe", 0.305))
    assert (decision.decided, decision.default) == (True, "margin")
    margin, poe = (result(decision, name) for name in ("margin", "poe"))
    assert margin.better and margin.state == TESTED and margin.reason == "" and margin.p_holm < 0.01
    assert margin.difference.mean == pytest.approx(0.12, abs=0.02) and margin.difference.seeds == 10
    assert margin.by_start.keys() == set(STARTS) and margin.iid == pytest.approx(0, abs=0.02)
    assert not poe.better and poe.reason
    assert margin.p_holm >= margin.difference.p, "corrected for three arms"


def test_nothing_becomes_the_default_if_nothing_moves() -> None:
    decision = decided(runs("margin", 0.305), runs("poe", 0.295))
    assert (decision.decided, decision.default) == (True, None)
    assert not any(each.better for each in decision.results)


@pytest.mark.parametrize(
    ("arm", "condition"),
    [
        (runs("small", 0.325), "0.03"),
        (runs("worse elsewhere", 0.42, iid=0.5), "unshifted"),
        (runs("as the control", 0.38), "control"),
    ],
)
def test_every_condition_counts(arm: ArmRuns, condition: str) -> None:
    more = runs(CONTROL, 0.40, is_push_term=False) if condition == "control" else MORE
    decision = decide(BASELINE, [arm, more], SCENES, CONTROL)
    assert (decision.decided, decision.default) == (True, None)
    found = result(decision, arm.name)
    assert found.state == TESTED and found.p_holm < 0.05 and condition in found.reason


def test_the_difference_must_be_positive_for_every_start() -> None:
    good, bad = runs("mixed", 0.60, KEYS[:5]), runs("bad", 0.28, KEYS[5:])
    arm = ArmRuns("mixed", {**good.primary, **bad.primary}, {**good.iid, **bad.iid}, 1.0, True)
    found = result(decided(arm), "mixed")
    assert found.by_start["a"] > 0.2 and found.by_start["b"] < 0 and "start" in found.reason


def test_of_equal_arms_the_fastest_is_chosen() -> None:
    decision = decided(
        runs("slow", 0.423, seconds=3), runs("fast", 0.42, seconds=1), runs("fastest", 0.37, seconds=0.5)
    )
    assert all(result(decision, name).better for name in ("slow", "fast", "fastest"))
    assert decision.default == "fast"


def test_other_arms_are_tested_and_never_the_default() -> None:
    decision = decided(runs("augmentation", 0.5, is_push_term=False), runs("margin", 0.305))
    assert result(decision, "augmentation").better and decision.default is None


def test_an_inactive_hinge_is_no_test() -> None:
    """With mu above 0 the arm has to be run again; with mu = 0 there is nothing left to try."""
    decision = decided(runs("margin", 0.5, active=0.2, mu=0.1), runs("poe", 0.305))
    assert (decision.decided, decision.default) == (False, None) and "margin" in decision.reason
    assert result(decision, "margin").state == INACTIVE
    decision = decided(runs("margin", 0.5, active=0.2, mu=0.0), runs("poe", 0.305))
    assert (decision.decided, decision.default) == (True, None)
    assert decided(runs("margin", 0.5, active=0.6, mu=0.1)).default == "margin"


@pytest.mark.parametrize("keys", [KEYS[:9], KEYS[:5], [], [*KEYS, ("c", 0)]])
def test_too_few_seeds_or_starts_are_not_decided(keys: list[Key]) -> None:
    baseline = runs("none", 0.30, [*KEYS, ("c", 0)])
    decision = decided(runs("margin", 0.5, keys), baseline=baseline)
    assert (decision.decided, decision.default) == (False, None)
    assert result(decision, "margin").state == UNDECIDED and "margin" in decision.reason
    assert result(decision, "margin").difference is None


def test_too_few_runs_of_the_baseline_or_the_control_are_not_decided() -> None:
    assert not decided(runs("margin", 0.5), baseline=runs("none", 0.3, KEYS[:4])).decided
    decision = decide(BASELINE, [runs("margin", 0.5), runs(CONTROL, 0.31, KEYS[:4])], SCENES, CONTROL)
    assert not decision.decided and CONTROL in decision.reason
    with pytest.raises(ValueError, match="no control"):
        decide(BASELINE, [runs("margin", 0.5)], SCENES, "no control")


def test_too_few_questions_or_scenes_are_not_decided() -> None:
    few = [f"scene{number % 20:04d}_00" for number in range(600)]
    assert "20 scenes" in result(decided(runs("margin", 0.5), scenes=few), "margin").reason
    half = ArmRuns("none", {key: value[:300] for key, value in BASELINE.primary.items()}, BASELINE.iid, 1.0)
    arms = [
        ArmRuns(arm.name, {key: value[:300] for key, value in arm.primary.items()}, arm.iid, 1.0, True)
        for arm in (runs("margin", 0.5), MORE)
    ]
    decision = decide(half, arms, SCENES[:300], CONTROL)
    assert not decision.decided and "300 questions" in result(decision, "margin").reason


def test_equal_differences_of_all_runs_are_no_test() -> None:
    one = next(iter(BASELINE.primary.values()))
    shifted = {key: value + 0.1 for key, value in BASELINE.primary.items()}
    assert len(one) == 600
    found = result(decided(ArmRuns("constant", shifted, BASELINE.iid, 1.0, True)), "constant")
    assert found.state == UNDECIDED and "spread" in found.reason
    equal = result(decided(ArmRuns("literal", BASELINE.primary, BASELINE.iid, 1.0, True)), "literal")
    assert (equal.state, equal.p_holm, equal.better) == (TESTED, 1.0, False)


def test_the_rule_of_the_study() -> None:
    """Fixed before the runs: docs/research/study.md has the same numbers."""
    assert (STUDY.starts, STUDY.seeds, STUDY.questions, STUDY.scenes) == (2, 5, 600, 50)
    assert (STUDY.active, STUDY.p, STUDY.effect, STUDY.iid_loss, STUDY.tie) == (0.5, 0.05, 0.03, 0.03, 0.01)
