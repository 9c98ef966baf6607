"""BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr-D of a corpus of captions, and of each of its items.

BLEU, ROUGE-L and CIDEr-D are the classes of pycocoevalcap (tylin/coco-caption, ``pycocoevalcap/{bleu,rouge,cider}``),
of which every reference evaluator contains a copy:

* BLEU-n = exp(min(0, 1 - r / c)) (prod_k p_k)^(1/n), where p_k = (matches_k + 1e-15) / (guesses_k + 1e-9) for the
  k-grams of the corpus, c is the number of words of the candidates, and r that of the references closest in length (of
  two equally close ones, the shorter). An order without a match gives a tiny number, not 0.
* ROUGE-L = mean of (1 + b^2) P R / (R + b^2 P), b = 1.2, P and R each the best of all references; words are split at
  every single space, so a doubled space adds an empty word.
* CIDEr-D = mean of 10 x mean_n cos(tf-idf_n) with clipping and the length penalty exp(-(l - l')^2 / (2 x 6^2)). The
  document frequencies come from the evaluated references, so scores of subsets are not comparable, and a corpus of one
  item scores 0.

METEOR and all scores of PTB-tokenized text need Java (``meteor.py``) and are None without it.
Scores are on the scales of the scorers: fractions, CIDEr 0 to 10 (papers print 1.0 as 100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from w2r2_ds.evaluation.metrics.meteor import Java

Tokenizer = Literal["none", "ptb"]
MetricValue = float | None
"""A score; None if it could not be computed."""

CAPTION_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
PAPER_METRICS = ("BLEU-4", "ROUGE-L", "CIDEr", "METEOR")
"""Caption metrics that papers print."""
ITEM_MEANS = ("ROUGE-L", "CIDEr")
"""Caption metrics whose score of a corpus is the mean of its items (CIDEr with document frequencies of the corpus)."""
NEEDS_PACKAGE = "Scoring captions needs pycocoevalcap: pip install 'w2r2-ds[metrics]'."
ITEM_MEAN = "METEOR_mean_of_items"
"""Mean of the METEOR scores of the items; it differs from METEOR of the corpus."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one corpus.

    Attributes:
        corpus: metric -> score; None if it was not computed.
        items: key of the item -> metric -> score.
        candidates: key -> scored string, after tokenization; empty if the tokenizer could not run.
        references: key -> reference strings, after tokenization; empty if the tokenizer could not run.
        not_computed: metric -> reason why its score is None.
    """

    corpus: dict[str, MetricValue]
    items: dict[str, dict[str, MetricValue]]
    candidates: dict[str, str]
    references: dict[str, list[str]]
    not_computed: dict[str, str] = field(default_factory=dict)


def score_captions(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    tokenizer: Tokenizer = "none",
    java: Java | None = None,
) -> CaptionScores:
    """Score one caption per item against the references of that item.

    Args:
        references: key of the item -> reference texts, at least one.
        candidates: the same keys -> caption.
        tokenizer: ``none`` scores the strings as they are; ``ptb`` tokenizes captions and references first.
        java: runner of METEOR and the tokenizer; `shared_java` if None.

    Raises:
        ValueError: the keys differ, there are none, a key has no reference, or pycocoevalcap is not installed.
    """
    _check(references, candidates)
    try:  # here, because pycocoevalcap is an optional dependency
        from w2r2_ds.evaluation.metrics.meteor import JavaError, shared_java
    except ImportError as error:
        raise ValueError(NEEDS_PACKAGE) from error
    java = java or shared_java()
    texts = {key: list(references[key]) for key in candidates}
    given = dict(candidates)
    if tokenizer == "ptb":
        try:
            texts, given = tokenize_captions(texts, given, java)
        except (JavaError, OSError) as error:
            names = (*CAPTION_METRICS, ITEM_MEAN)
            none: dict[str, dict[str, MetricValue]] = {key: dict.fromkeys(CAPTION_METRICS) for key in candidates}
            return CaptionScores(dict.fromkeys(names), none, {}, {}, dict.fromkeys(names, str(error)))
    corpus, items = _coco_scores(texts, given)
    reasons = {}
    if corpus["CIDEr"] is None:
        reasons["CIDEr"] = "No reference has a word, so there are no document frequencies."
    try:
        corpus["METEOR"], values = java.meteor(list(texts.values()), list(given.values()))
        corpus[ITEM_MEAN] = sum(values) / len(values)
        meteor: Sequence[MetricValue] = values
    except JavaError as error:
        corpus["METEOR"] = corpus[ITEM_MEAN] = None
        meteor = [None] * len(given)
        reasons |= dict.fromkeys(("METEOR", ITEM_MEAN), str(error))
    for item, value in zip(items.values(), meteor, strict=True):
        item["METEOR"] = value
    return CaptionScores(corpus, items, given, texts, reasons)


def tokenize_captions(
    references: Mapping[str, Sequence[str]], candidates: Mapping[str, str], java: Java
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Tokenize references and candidates with the PTB tokenizer, in one Java process.

    Returns:
        The tokenized references and the tokenized candidates, with the same keys.

    Raises:
        JavaError: Java is missing or failed.
    """
    counts = {key: len(texts) for key, texts in references.items()}
    lines = iter(java.tokenize([*(t for texts in references.values() for t in texts), *candidates.values()]))
    tokenized = {key: [next(lines) for _ in range(count)] for key, count in counts.items()}
    return tokenized, {key: next(lines) for key in candidates}


def _coco_scores(
    references: Mapping[str, list[str]], candidates: Mapping[str, str]
) -> tuple[dict[str, MetricValue], dict[str, dict[str, MetricValue]]]:
    """BLEU, ROUGE-L and CIDEr-D: metric -> score of the corpus, and key -> metric -> score of an item."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError(NEEDS_PACKAGE) from error
    lists = {key: [text] for key, text in candidates.items()}
    bleu, bleu_items = Bleu(4).compute_score(references, lists, verbose=0)
    columns: dict[str, tuple[MetricValue, Sequence[MetricValue]]] = {}
    for order, (score, values) in enumerate(zip(bleu, bleu_items, strict=True), start=1):
        columns[f"BLEU-{order}"] = (score, values)
    columns["ROUGE-L"] = Rouge().compute_score(references, lists)
    if any(text.split() for texts in references.values() for text in texts):
        columns["CIDEr"] = Cider().compute_score(references, lists)
    else:  # pycocoevalcap raises an error if no reference has a word, because there are no document frequencies
        columns["CIDEr"] = (None, [None] * len(lists))
    items: dict[str, dict[str, MetricValue]] = {key: {} for key in lists}
    for name, (_, values) in columns.items():
        for item, value in zip(items.values(), values, strict=True):
            item[name] = None if value is None else float(value)  # not NumPy's float, for JSON
    return {name: None if score is None else float(score) for name, (score, _) in columns.items()}, items


def _check(references: Mapping[str, Sequence[str]], candidates: Mapping[str, str]) -> None:
    """Raise ValueError if there are no captions, the keys differ, or a caption has no reference."""
    if not candidates:
        raise ValueError("There are no captions to score.")
    unpaired = sorted(references.keys() ^ candidates.keys())
    if unpaired:
        raise ValueError(
            f"References and captions must have the same keys; {len(unpaired)} have only one, such as {unpaired[0]!r}."
        )
    without = [key for key, texts in references.items() if not texts]
    if without:
        raise ValueError(f"{len(without)} captions have no reference, the first is {without[0]!r}.")
