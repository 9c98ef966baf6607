"""Shares of answers that follow a cue, on answers with a known class."""

from __future__ import annotations

import numpy as np
import pytest

from w2r2_ds.diagnostics.shortcut_cue import cue_shares

TRUTH = np.array([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def moved(distance: float) -> np.ndarray:
    """The true box, moved along x; the IoU is (1 - distance) / (1 + distance)."""
    return TRUTH + np.array([distance, *[0.0] * 8])


def shares(predicted: list[np.ndarray | None], cue: np.ndarray | None, **options: object) -> object:
    return cue_shares(predicted, [TRUTH] * len(predicted), [cue] * len(predicted), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("measure", "near"), [("iou", 0.59), ("centre", 0.49)])
def test_answers_along_the_line_from_truth_to_cue(measure: str, near: float) -> None:
    """IoU 0.25 is a distance of 0.6 m; boxes beyond it, and answers without a box, follow neither."""
    predicted = [TRUTH, moved(near), moved(0.7), moved(1.3), moved(2.0 - near), moved(2.0), moved(4.0), None]
    result = shares(predicted, moved(2.0), measure=measure)
    assert result.labels == ("truth", "truth", "neither", "neither", "cue", "cue", "neither", "neither")
    assert result.scored == 8
    assert (result.truth, result.cue, result.neither) == (0.25, 0.25, 0.5)
    assert result.position == pytest.approx(1.3 / 2)  # the middle of the seven boxes


def test_the_nearer_centre_at_any_distance() -> None:
    result = shares([TRUTH, moved(0.9), moved(1.1), moved(-9.0), moved(9.0), None], moved(2.0), measure="nearest")
    assert result.labels == ("truth", "truth", "cue", "truth", "cue", "neither")
    assert shares([TRUTH], moved(0.4), measure="nearest").labels == ("unscored",)


def test_an_answer_that_overlaps_both_follows_the_nearer() -> None:
    # Truth and cue have IoU 0.2 with each other, so they can be told apart at 0.25; answers between overlap both.
    cue = moved(2 / 3)
    result = shares([moved(0.3), moved(0.36)], cue)
    assert result.labels == ("truth", "cue")


@pytest.mark.parametrize(
    ("measure", "threshold", "close"), [("iou", 0.25, 0.59), ("iou", 0.5, 0.33), ("centre", 0.8, 0.8)]
)
def test_items_whose_truth_and_cue_are_close_are_not_scored(measure: str, threshold: float, close: float) -> None:
    truth, predicted = [TRUTH] * 3, [TRUTH] * 3
    cues = [moved(close), None, moved(3.0)]
    result = cue_shares(predicted, truth, cues, measure, threshold)  # type: ignore[arg-type]
    assert result.labels == ("unscored", "unscored", "truth")
    assert (result.scored, result.truth) == (1, 1.0)


def test_without_scored_items_shares_are_nan() -> None:
    for result in (shares([], None), shares([TRUTH], None)):
        assert result.scored == 0
        assert np.isnan([result.truth, result.cue, result.neither, result.position]).all()


def test_boxes_of_six_and_nine_numbers_and_of_other_angles() -> None:
    """A box turned by a quarter is the same box if its sides are swapped."""
    long = np.array([0.0, 0.0, 0.5, 4.0, 0.5, 1.0])
    turned = np.array([0.0, 0.0, 0.5, 0.5, 4.0, 1.0, np.pi / 2, 0.0, 0.0])
    across = np.array([0.0, 0.0, 0.5, 4.0, 0.5, 1.0, np.pi / 2, 0.0, 0.0])
    result = cue_shares([long, turned, across], [long] * 3, [across] * 3)
    assert result.labels == ("truth", "truth", "cue")  # the centres are equal, so `centre` scores none of them
    assert cue_shares([long], [long], [across], "centre").labels == ("unscored",)
    arrays = (np.stack([turned, across]), np.stack([long] * 2), np.stack([across] * 2))
    assert cue_shares(*arrays).labels == ("truth", "cue")


def test_predictions_that_are_not_finite_follow_neither() -> None:
    result = shares([np.full(6, np.nan), np.array([np.inf, 0, 0, 1, 1, 1])], moved(2.0))
    assert result.labels == ("neither", "neither")
    assert np.isnan(result.position)


@pytest.mark.parametrize(
    ("predicted", "truth", "cue", "measure", "message"),
    [
        ([None], [TRUTH, TRUTH], [None], "iou", "1 predictions, 2 true boxes"),
        ([TRUTH[:5]], [TRUTH], [TRUTH], "iou", r"predicted\[0\]"),
        ([TRUTH], [TRUTH * np.nan], [TRUTH], "iou", "true box"),
        ([TRUTH], [TRUTH], [TRUTH], "giou", "measure is 'giou'"),
    ],
)
def test_errors(predicted: list, truth: list, cue: list, measure: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cue_shares(predicted, truth, cue, measure)  # type: ignore[arg-type]
