"""Measures of causality on models whose answer is known: one ignores the geometry, one reads it off, others partly."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from w2r2_ds.diagnostics.causality.measures import NUMBERS, Answers, measure_causality
from w2r2_ds.models.geometry.point_transforms import world_change

Model = Callable[[np.ndarray], np.ndarray]
"""Boxes that the geometry shows ``[n, 9]`` -> boxes of the answers; a model that ignores it answers a constant."""

rng = np.random.default_rng(0)
SCENES = [f"scene{number:04d}_00" for number in range(12) for _ in range(5)]
BOXES = np.concatenate([rng.uniform(-3, 3, (60, 3)), rng.uniform(0.3, 2, (60, 3)), rng.uniform(-1, 1, (60, 3))], axis=1)
CHANGES = [world_change(scale=0.7), world_change(scale=1.4)]


def reads_geometry(shown: np.ndarray) -> np.ndarray:
    return shown


def ignores_geometry(shown: np.ndarray) -> np.ndarray:
    return BOXES


def half(shown: np.ndarray) -> np.ndarray:
    return (shown + BOXES) / 2


def answers_of(model: Model) -> Answers:
    """Answers of a model to the boxes under all changes; the expected ones are the answers before, changed."""
    before = model(BOXES)
    after = [model(np.stack([change.apply_box(box) for box in BOXES])) for change in CHANGES]
    expected = [np.stack([change.apply_box(box) for box in before]) for change in CHANGES]
    return Answers(SCENES * 2, np.concatenate([before] * 2), np.concatenate(after), np.concatenate(expected))


@pytest.mark.parametrize(
    ("model", "slope", "follows"), [(reads_geometry, 1, 1), (ignores_geometry, 0, 0), (half, 0.5, 0)]
)
def test_the_slope_is_the_share_of_the_geometry(model: Model, slope: float, follows: float) -> None:
    measures = measure_causality(answers_of(model), 200)
    assert (measures["rows"], measures["compared"]) == (120, 120)
    assert measures["unchanged"] == (1 if model is ignores_geometry else 0)
    for name in NUMBERS[:6]:
        found = measures["numbers"][name]
        values = [found["slope"][key] for key in ("value", "low", "high")]
        assert values == pytest.approx([slope] * 3, abs=1e-9), name
        if model is half:  # exactly in the middle: rounding decides
            continue
        assert found["follows"]["value"] == follows
        if slope:
            assert found["correlation"]["value"] == pytest.approx(1)
        else:
            assert found["correlation"]["value"] is None and found["correlation"]["reason"]
    assert measures["numbers"]["centre"]["follows"]["value"] == follows or model is half
    assert json.dumps(measures, allow_nan=False)


def test_angles_do_not_move_under_scale_and_wrap_around() -> None:
    measures = measure_causality(answers_of(reads_geometry), 100)
    assert [measures["numbers"][name]["rows"] for name in NUMBERS[6:]] == [0, 0, 0]
    assert measures["numbers"]["a0"]["slope"]["value"] is None
    before = BOXES.copy()
    before[:, 6] = 3.1
    after, expected = before.copy(), before.copy()
    after[:, 6], expected[:, 6] = 3.2 - 2 * np.pi, 3.2  # the same direction
    found = measure_causality(Answers(SCENES, before, after, expected), 100)["numbers"]["a0"]
    assert found["slope"]["value"] == pytest.approx(1) and found["follows"]["value"] == 1


def test_noise_lowers_the_correlation_and_not_the_slope() -> None:
    exact = answers_of(reads_geometry)
    noisy = Answers(exact.scenes, exact.before, exact.after + rng.normal(0, 0.5, exact.after.shape), exact.expected)
    found = measure_causality(noisy, 500)["numbers"]["x"]
    assert found["slope"]["value"] == pytest.approx(1, abs=0.3)  # four standard deviations of this noise
    assert 0.1 < found["slope"]["high"] - found["slope"]["low"] < 0.6
    assert 0.5 < found["correlation"]["low"] < found["correlation"]["high"] < 0.99
    x, y = (part[:, 0] - noisy.before[:, 0] for part in (noisy.expected, noisy.after))
    moved = np.abs(x) >= 0.01
    assert found["rows"] == moved.sum()
    assert found["slope"]["value"] == pytest.approx((x * y)[moved].sum() / (x * x)[moved].sum())
    assert found["correlation"]["value"] == pytest.approx(np.corrcoef(x[moved], y[moved])[0, 1])


def test_a_model_that_moves_at_random_follows_by_chance() -> None:
    """Half of the answers are nearer to the expected number, but without correlation."""
    exact = answers_of(reads_geometry)
    shuffled = exact.before + rng.normal(0, 5, exact.before.shape)
    found = measure_causality(Answers(exact.scenes, exact.before, shuffled, exact.expected), 500)["numbers"]["x"]
    assert abs(found["correlation"]["value"]) < 0.4  # four standard deviations
    assert 0.3 < found["follows"]["value"] < 0.7


def test_answers_without_box_are_not_compared() -> None:
    exact = answers_of(reads_geometry)
    after = exact.after.copy()
    after[:90] = np.nan
    measures = measure_causality(Answers(exact.scenes, exact.before, after, exact.expected), 100)
    assert (measures["rows"], measures["compared"]) == (120, 30)
    assert measures["numbers"]["x"]["slope"]["value"] == pytest.approx(1)
    after[:] = np.nan
    measures = measure_causality(Answers(exact.scenes, exact.before, after, exact.expected), 100)
    assert (measures["compared"], measures["unchanged"]) == (0, None)
    assert measures["numbers"]["x"]["slope"]["value"] is None


def test_without_any_box_nothing_is_compared() -> None:
    nothing = np.full((60, 9), np.nan)
    measures = measure_causality(Answers(SCENES, nothing, nothing, nothing), 100)
    assert (measures["rows"], measures["compared"], measures["unchanged"]) == (60, 0, None)


def test_numbers_that_the_answers_lack_are_skipped() -> None:
    """World boxes have six numbers."""
    exact = answers_of(reads_geometry)
    parts = [part.copy() for part in (exact.before, exact.after, exact.expected)]
    for part in parts:
        part[:, 6:] = np.nan
    measures = measure_causality(Answers(exact.scenes, *parts), 100)
    assert measures["numbers"].keys() == {*NUMBERS[:6], "centre"}
    assert measures["compared"] == 120 and measures["numbers"]["z"]["slope"]["value"] == pytest.approx(1)


def test_few_scenes_have_no_interval() -> None:
    exact = answers_of(reads_geometry)
    found = measure_causality(Answers(["one"] * 120, exact.before, exact.after, exact.expected), 100)["numbers"]["x"]
    assert found["slope"]["value"] == pytest.approx(1) and found["slope"]["low"] is None
    assert found["correlation"]["value"] == pytest.approx(1) and found["correlation"]["reason"]


@pytest.mark.parametrize(("decimals", "tolerance"), [(1, 0.02), (2, 0.004)])
def test_rounded_answers(decimals: int, tolerance: float) -> None:
    """Tolerance: rounding moves a size of 0.3 to 2 m by at most half a unit, with both signs."""
    follows = answers_of(lambda shown: shown.round(decimals))
    found = measure_causality(follows, 100, decimals=decimals)["numbers"]
    stays = measure_causality(answers_of(lambda shown: BOXES.round(decimals)), 100, decimals=decimals)["numbers"]
    for name in NUMBERS[:6]:
        assert found[name]["slope"]["value"] == pytest.approx(1, abs=tolerance), name
        assert found[name]["follows"]["value"] > 0.95, name
        assert stays[name]["slope"]["value"] == stays[name]["follows"]["value"] == 0, name


def test_changes_below_the_resolution_of_the_answers_do_not_count() -> None:
    before, after, expected = (np.zeros((4, 9)) for _ in range(3))
    before[:, 0] = 0.2
    # The last change is one unit, although the difference of the binary numbers is a little smaller.
    expected[:, 0] = [0.2, 0.22, 0.11, 0.3]
    after[:, 0] = [0.2, 0.2, 0.2, 0.3]
    answers = Answers(SCENES[:4], before, after, expected)
    assert expected[3, 0] - before[3, 0] < 0.1
    coarse, fine = (measure_causality(answers, 100, decimals=decimals)["numbers"] for decimals in (1, 2))
    assert [each["x"]["rows"] for each in (coarse, fine)] == [each["centre"]["rows"] for each in (coarse, fine)]
    assert (coarse["x"]["rows"], fine["x"]["rows"]) == (1, 3)
    assert coarse["x"]["slope"]["value"] == pytest.approx(1) and fine["x"]["slope"]["value"] < 1
    still = measure_causality(Answers(SCENES[:4], before, after, before), 100, decimals=1)["numbers"]["x"]
    assert "0.1" in still["slope"]["reason"]
