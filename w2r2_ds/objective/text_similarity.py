"""How similar two texts are: s of captions and of short answers. Pure functions of strings, on the host.

All are in [0, 1], 1 for equal texts. Two texts without words are equal; a text without words and one with words share
nothing and score 0. They score single answers during training; corpus scores of benchmarks are evaluation's.
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
"""Weight of recall against precision in ROUGE-L, as in COCO caption scoring."""

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of lower-cased words, beta = 1.2.

    C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, Eqs. 2 to 4, for one sentence, with the
    beta of COCO caption scoring (X. Chen et al., arXiv 1504.00325). Words are what white space separates: no stemming,
    no tokenizer. Equal to pycocoevalcap's `Rouge` for one reference, which only sees a word more in doubled blanks.
    """
    predicted, expected = prediction.lower().split(), reference.lower().split()
    common = _longest_common(predicted, expected)
    if not common:
        return float(predicted == expected)
    precision, recall = common / len(predicted), common / len(expected)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words.

    P. Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of text", 2016, and its evaluation script:
    lower case, without ASCII punctuation and the articles a, an, the.
    """
    predicted, expected = _bag(prediction), _bag(reference)
    common = (predicted & expected).total()
    if not common:
        return float(predicted == expected)
    return 2 * common / (predicted.total() + expected.total())


def exact_match(prediction: str, reference: str) -> float:
    """1 where the texts are equal but for case, white space and a full stop at the end, else 0.

    ScanQA's EM (D. Azuma et al., CVPR 2022) compares the strings as they are; generated answers end with a full stop or
    not by habit, which is independent of the question.
    """
    return float(_folded(prediction) == _folded(reference))


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "token_f1": token_f1,
    "exact_match": exact_match,
}


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
        predictions: a text per sample; those of grounding samples are not used.
        references: a text per sample.
        tasks: name of every sample's task, which may have a similarity of its own (`Task.text_similarity`).
        kinds: kind of every answer.
        caption, answer: keys of ``TEXT_SCORES`` for captions and for short answers of the other tasks.

    Returns:
        ``[batch]`` float64 on the CPU, 0 for grounding samples.
    """
    score_of = {"caption": TEXT_SCORES[caption], "answer": TEXT_SCORES[answer]}
    scores = []
    for prediction, reference, task, kind in zip(predictions, references, tasks, kinds, strict=True):
        own = None if kind == "grounding" else TASKS.find(task).text_similarity(prediction, reference)
        if own is not None:
            scores.append(own)
        else:
            scores.append(0.0 if kind == "grounding" else score_of[kind](prediction, reference))
    return torch.tensor(scores, dtype=torch.float64)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over one row."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]


def _bag(text: str) -> Counter[str]:
    return Counter(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
