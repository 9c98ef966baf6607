"""Word overlap of captions and answers, computed by hand."""

from __future__ import annotations

import pytest
import torch

from w2r2_ds.objective.text_similarity import exact_match, rouge_l, text_similarity, token_f1


@pytest.mark.parametrize(
    ("prediction", "reference", "common"),
    [
        ("the red chair", "The red  chair\n", 3),
        ("a chair by the desk", "the chair is black", 1),
        # A subsequence, in order: "the ... is ... white".
        ("the desk is white", "the big desk there is quite white", 4),
        ("white is the desk", "the desk is white", 2),
        ("the the the", "the chair", 1),
        ("a b c d e f", "f e d c b a", 1),
        ("chair.", "chair", 0),
        ("a table", "the chair", 0),
    ],
)
def test_rouge_l(prediction: str, reference: str, common: int) -> None:
    precision, recall = common / len(prediction.split()), common / len(reference.split())
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if common else 0.0
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)
    assert rouge_l(reference, reference) == pytest.approx(1.0, abs=1e-12)


def test_rouge_l_by_hand() -> None:
    """3 of 4 words match 3 of 6: P = 0.75, R = 0.5, F = 2.44 P R / (R + 1.44 P) = 0.915 / 1.58.

    Recall has more weight.
    """
    short, long = "the chair is black", "the chair is by the desk"
    assert rouge_l(short, long) == pytest.approx(0.915 / 1.58, abs=1e-12)
    assert rouge_l(long, short) == pytest.approx(0.915 / (0.75 + 1.44 * 0.5), abs=1e-12)
    assert rouge_l(long, short) > rouge_l(short, long)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The red chair.", "red chair", 1.0),
        ("chair, red", "a red chair", 1.0),
        ("red chair", "red sofa", 0.5),
        ("two two two", "two chairs", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("two two", "two two chairs", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("left", "right", 0.0),
        ("another theme", "other me", 0.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected, abs=1e-12)
    assert token_f1(reference, prediction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Brown", "brown", 1.0),
        ("  two   chairs.\n", "two chairs", 1.0),
        ("two chairs", "Two chairs .", 1.0),
        ("two chairs..", "two chairs", 0.0),
        ("2.5", "25", 0.0),
        ("the chair", "chair", 0.0),
        ("brown!", "brown", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert exact_match(prediction, reference) == expected
    assert exact_match(reference, prediction) == expected


@pytest.mark.parametrize("score", [rouge_l, token_f1, exact_match])
def test_texts_without_words(score: object) -> None:
    assert callable(score)
    assert (score("", ""), score(" \n", ""), score("", "chair"), score("chair", " ")) == (1.0, 1.0, 0.0, 0.0)


def test_texts_of_articles_and_punctuation_alone_have_no_words_for_f1() -> None:
    assert (token_f1("the .", "a"), token_f1("the", "chair")) == (1.0, 0.0)


def test_batch_of_kinds() -> None:
    predictions = ["red chair", "not used", "red chair", "Two."]
    references = ["red sofa", "", "red sofa", "two"]
    kinds = ("caption", "grounding", "answer", "answer")
    tasks = ("scan2cap", "scanrefer", "scanqa", "scanqa")
    scores = text_similarity(predictions, references, tasks, kinds, "rouge_l", "exact_match")
    assert scores.dtype == torch.float64
    assert scores.tolist() == [pytest.approx(0.5), 0, 0, 1]
    assert text_similarity(predictions, references, tasks, kinds, "token_f1", "token_f1").tolist() == [0.5, 0, 0.5, 1]
    with pytest.raises(ValueError, match="shorter"):
        text_similarity(predictions, references[:3], tasks, kinds, "rouge_l", "exact_match")
