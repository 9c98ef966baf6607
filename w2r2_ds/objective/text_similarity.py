"""Word overlap of two texts: similarity s of captions and of short answers. Pure functions of strings, on the CPU.

Every measure is in [0, 1], and 1 for equal texts. Two texts without words count as equal; if only one of them has
words, the measure is 0. These measures score single answers during training. Benchmark scores over a whole data set are
in `evaluation/metrics`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.types.sample import Kind

BETA = 1.2
"""Weight of recall relative to precision in ROUGE-L, as in COCO caption scoring."""

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of lower-cased words, with beta = 1.2.

    C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, Eqs. 2 to 4, for one sentence, with the
    beta of COCO caption scoring (X. Chen et al., arXiv 1504.00325). Words are separated by white space, without
    stemming or a tokenizer. Equal to `Rouge` of pycocoevalcap for lower-cased texts and one reference, except that
    pycocoevalcap counts an empty word between two spaces.
    """
    predicted, expected = prediction.lower().split(), reference.lower().split()
    common = _longest_common_subsequence(predicted, expected)
    if not common:
        return float(predicted == expected)
    precision, recall = common / len(predicted), common / len(expected)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words of two texts.

    P. Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of text", 2016. Normalised as in SQuAD's
    evaluation script: lower case, without ASCII punctuation and without the articles a, an, the.
    """
    predicted, expected = _bag_of_words(prediction), _bag_of_words(reference)
    common = (predicted & expected).total()
    if not common:
        return float(predicted == expected)
    return 2 * common / (predicted.total() + expected.total())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the texts are equal up to case, white space and a full stop at the end, else 0.0.

    ScanQA's EM (D. Azuma et al., CVPR 2022) compares unchanged strings. Here the full stop is ignored: whether a model
    ends its answers with one does not depend on the question.
    """
    return float(_normalize(prediction) == _normalize(reference))


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "token_f1": token_f1,
    "exact_match": exact_match,
}
"""Measures by their name in `objective.caption_similarity` and `objective.answer_similarity`."""


def text_similarity(
    predictions: Sequence[str],
    references: Sequence[str],
    tasks: Sequence[str],
    kinds: Sequence[Kind],
    caption: Literal["rouge_l", "token_f1"],
    answer: Literal["exact_match", "token_f1"],
) -> torch.Tensor:
    """s of every caption and short answer of a batch.

    Args:
        predictions: predicted text of every sample; those of grounding samples are not used.
        references: label of every sample.
        tasks: task of every sample. A task may define its own measure (`Task.text_similarity`).
        kinds: kind of every sample's answer.
        caption: measure of captions, a key of `TEXT_SCORES`, for tasks without their own measure.
        answer: measure of short answers, also a key of `TEXT_SCORES`.

    Returns:
        ``[batch]`` float64 on the CPU, 0 for grounding samples.
    """
    measures = {"caption": TEXT_SCORES[caption], "answer": TEXT_SCORES[answer]}
    scores = []
    for prediction, reference, task, kind in zip(predictions, references, tasks, kinds, strict=True):
        if kind == "grounding":
            scores.append(0.0)
            continue
        own_score = TASKS.find(task).text_similarity(prediction, reference)
        scores.append(measures[kind](prediction, reference) if own_score is None else own_score)
    return torch.tensor(scores, dtype=torch.float64)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two word lists."""
    # Dynamic programming with one row of the table: before a word of `first`, lengths[j] is the result for the words
    # of `first` so far and the first j words of `second`; `diagonal` is that row's value at j - 1.
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]


def _bag_of_words(text: str) -> Counter[str]:
    """Number of occurrences of every word; lower case, without punctuation and articles."""
    return Counter(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _normalize(text: str) -> str:
    """Lower case, single spaces, without one full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
