"""ScanQA: short answers against several references, as five public evaluators score them.

The evaluators differ in the normalisation of the texts (none, full stops removed, or `clean_answer` on one or both
sides), in the rule for a match, and in whether the PTB tokenizer is applied before the caption metrics (BLEU, METEOR,
ROUGE-L, CIDEr). Here all of them divide by the number of questions, and a question without a prediction is scored as an
empty answer. The official script raises an error at such a question; Video-3D-LLM omits it from the denominator, which
raises its scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from w2r2_ds.evaluation.metrics.captions import ITEM_MEANS, PAPER_METRICS, MetricValue, Tokenizer, score_captions
from w2r2_ds.evaluation.protocols.records import (
    AnswerRecord,
    Proposals,
    RecordFields,
    ReferenceFields,
    check_keys,
    raise_with_first,
)
from w2r2_ds.evaluation.protocols.registry import ItemTerms, Protocol, ProtocolResult, register_protocol

if TYPE_CHECKING:
    from w2r2_ds.evaluation.metrics.meteor import Java

_STRIPPED = re.compile(r"[^a-zA-Z0-9,'\s\-:]")
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TYPOS = {
    "left": ("let", "letf"),
    "right": ("rigth", "rght"),
    "there": ("tehre",),
    "behind": ("behine",),
    "chair": ("chai",),
    "washing": ("wasing",),
    "walked": ("waslked",),
    "o'clock": ("oclock", "o' clock"),
}
_WORDS: dict[str, str] = {
    **{typo: word for word, typos in _TYPOS.items() for typo in typos},
    "tv": "TV",
    **{str(number): word for number, word in enumerate(_NUMBERS)},
    # As in LEO's table, which has neither 21 nor 22.
    "23": "twenty-three",
    "none": "zero",
}
_WORD = re.compile(r"\b(" + "|".join(map(re.escape, _WORDS)) + r")\b")
_TRAILING_DIGIT = re.compile(r"\b([a-zA-Z]+)[0-9]\b")
# Applied one after the other. A match consumes the next word too, so "the the chair" becomes "the chair", as in LEO.
_ARTICLES = tuple(re.compile(rf"\b{article} ([a-zA-Z]+)") for article in ("a", "an", "the"))


def clean_answer(text: str) -> str:
    """Normalise an answer as LEO does: lower case, no articles, number words, a few typos corrected.

    In this order: lower case; spaces at the ends removed, runs of spaces replaced by one; characters other than ASCII
    letters, digits, white space and ``, ' - :`` deleted ("2.5 m" becomes "25 m", "café" becomes "caf"; spaces that
    this leaves at the ends stay); typos corrected, "tv" -> "TV", 0..20 and 23 -> words, "none" -> "zero"; one digit
    at the end of a word deleted; "a", "an", "the" before a word deleted; "backwards" -> "backward".

    Source: embodied-generalist/embodied-generalist ``data/data_utils.py``.
    """
    text = re.sub(" +", " ", text.lower().strip(" "))
    text = _STRIPPED.sub("", text)
    text = _WORD.sub(lambda found: _WORDS[found.group()], text)
    text = _TRAILING_DIGIT.sub(r"\1", text)
    for article in _ARTICLES:
        text = article.sub(r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def match_any(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """(EM, EM-refined) of a prediction; an exact match takes precedence over containment (VLM-3R)."""
    if prediction in answers:
        return 1, 1
    return 0, int(any(_either_contains(prediction, answer) for answer in answers))


def match_in_order(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """(EM, EM-refined) of the first answer that matches exactly or by containment (LEO).

    The order of the answers counts: "brown" against ["dark brown", "brown"] is (0, 1), and (1, 1) if they are swapped.
    """
    for answer in answers:
        if prediction == answer:
            return 1, 1
        if _either_contains(prediction, answer):
            return 0, 1
    return 0, 0


def match_nonempty(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """`match_any`, except that an empty prediction is (0, 0) (Chat-Scene)."""
    return match_any(prediction, answers) if prediction else (0, 0)


def _either_contains(first: str, second: str) -> bool:
    """Whether one text is a substring of the other, without white space; the empty text is one of every text."""
    first, second = "".join(first.split()), "".join(second.split())
    return first in second or second in first


Match = Callable[[str, Sequence[str]], tuple[int, int]]
"""(prediction, references) -> (EM, EM-refined)."""
EM, EM_REFINED, EM_AT_10 = "EM", "EM-refined", "EM@10"


@dataclass(frozen=True)
class ScanQaRules:
    """Text normalisation and matching rules of one public evaluator.

    Attributes:
        description: one sentence.
        source: repository and file.
        prediction: normalisation of a prediction for `match` and the caption metrics; ``str`` is the identity.
        answer: normalisation of each reference answer, for the same.
        match: rule for EM and EM-refined of normalised texts; None if EM compares raw texts and there is no EM-refined.
        tokenizer: tokenizer of the caption metrics, applied after the normalisation.
        ranked: whether EM@10 of ten ranked answers is scored.
    """

    description: str
    source: str
    prediction: Callable[[str], str]
    answer: Callable[[str], str]
    match: Match | None
    tokenizer: Tokenizer
    ranked: bool = False


def _strip_trailing_periods(text: str) -> str:
    return text.rstrip(".")


def _chatscene(text: str) -> str:
    """Chat-Scene's normalisation: one full stop removed, first letter in lower case, then `clean_answer`."""
    text = text.removesuffix(".")
    return clean_answer(text[:1].lower() + text[1:])


SCANQA_RULES: Mapping[str, ScanQaRules] = {
    # From `evals_json` and `eval_pycoco`; their F-value and SPICE are not computed here.
    "scanqa_official": ScanQaRules(
        "EM and EM@10 of raw texts; caption metrics of PTB-tokenized texts.",
        "ATR-DBI/ScanQA scripts/score.py",
        str,
        str,
        match=None,
        tokenizer="ptb",
        ranked=True,
    ),
    # From `main` of both scripts.
    "video3dllm": ScanQaRules(
        "EM of raw texts; caption metrics without tokenizer, final full stops of predictions removed.",
        "LaVi-Lab/Video-3D-LLM llava/eval/eval_scanqa.py; "
        "diankun-wu/Spatial-MLLM src/evaluation/scanqa/score_scanqa.py",
        _strip_trailing_periods,
        str,
        match=None,
        tokenizer="none",
    ),
    # From `ScanQAEvaluator.update`.
    "leo": ScanQaRules(
        "Cleaned texts on both sides; EM and EM-refined of the first answer that matches at all; no tokenizer.",
        "embodied-generalist/embodied-generalist evaluator/scanqa_eval.py",
        clean_answer,
        clean_answer,
        match_in_order,
        tokenizer="none",
    ),
    # From `answer_match` and `calc_scanqa_score`.
    "vlm3r": ScanQaRules(
        "Cleaned texts on both sides; an exact match takes precedence over containment; PTB tokenizer.",
        "VITA-Group/VLM-3R llava/eval/scanqa_evaluator.py",
        clean_answer,
        clean_answer,
        match_any,
        tokenizer="ptb",
    ),
    # From `calc_scanqa_score`.
    "chatscene": ScanQaRules(
        "Only the prediction is cleaned, an empty one matches nothing; PTB tokenizer.",
        "ZzZZCHS/Chat-Scene utils/eval.py",
        _chatscene,
        str,
        match_nonempty,
        tokenizer="ptb",
    ),
}
"""Second part of the protocol's name -> rules. The comments name the reference's functions."""


def score_scanqa(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, Sequence[str]],
    protocol: str,
    java: Java | None = None,
) -> ProtocolResult:
    """EM, EM-refined and caption metrics of a set of questions.

    Args:
        references: question id -> its reference answers.
        predictions: question id -> ranked answers, best first; a list of one for a model that gives one answer.
        protocol: a key of ``SCANQA_RULES``.
        java: see `score_captions`.

    Returns:
        ``protocol``, ``questions``, ``missing`` (questions without a prediction), and ``corpus``, ``items``,
        ``candidates``, ``references``, ``not_computed`` as in `CaptionScores`. ``corpus`` and ``items`` also have
        ``EM`` and, if the protocol has them, ``EM-refined`` and ``EM@10``; EM@10 is None if no prediction has a second
        answer.

    Raises:
        ValueError: a question without answers (the test split), or a prediction of an unknown question.
    """
    check_keys("questions", list(references), predictions)
    unanswered = [key for key, answers in references.items() if not answers]
    raise_with_first(unanswered, "questions have no answers", "; the test split cannot be scored here")
    texts = [key for key, answers in predictions.items() if isinstance(answers, str)]
    raise_with_first(texts, "predictions are one text instead of a list of answers, best first")
    rules = SCANQA_RULES[protocol]
    ranked = {key: list(predictions.get(key, ())) or [""] for key in references}  # no prediction: an empty answer
    candidates = {key: rules.prediction(answers[0]) for key, answers in ranked.items()}
    normalized = {key: [rules.answer(text) for text in answers] for key, answers in references.items()}
    scores = score_captions(normalized, candidates, rules.tokenizer, java)

    exact, reasons = _exact_matches(references, ranked, candidates, normalized, rules)
    corpus = {name: _mean([item[name] for item in exact.values()]) for name in next(iter(exact.values()))}
    return {
        "protocol": protocol,
        "questions": len(references),
        "missing": sum(key not in predictions for key in references),
        "corpus": corpus | scores.corpus,
        "items": {key: exact[key] | item for key, item in scores.items.items()},
        "candidates": scores.candidates,
        "references": scores.references,
        "not_computed": {**scores.not_computed, **reasons},
    }


def answer_terms(result: ProtocolResult) -> list[ItemTerms]:
    """``Protocol.item_terms``: EM, EM-refined and the caption metrics that are means of items."""
    names = (EM, EM_REFINED, *ITEM_MEANS)
    return [
        ItemTerms((), {name: (item[name], 1.0) for name in names if item.get(name) is not None})
        for item in result["items"].values()
    ]


def _exact_matches(
    references: Mapping[str, Sequence[str]],
    ranked: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    normalized: Mapping[str, Sequence[str]],
    rules: ScanQaRules,
) -> tuple[dict[str, dict[str, MetricValue]], dict[str, str]]:
    """EM, EM-refined and EM@10 of every question, and, for metrics that are None, the reason.

    Args:
        references: question id -> raw reference answers.
        ranked: question id -> raw predictions, best first, at least one.
        candidates: question id -> normalised first prediction.
        normalized: question id -> normalised reference answers.
        rules: rules of the protocol.
    """
    exact: dict[str, dict[str, MetricValue]] = {}
    has_ranked = any(len(answers) > 1 for answers in ranked.values())
    for key, answers in ranked.items():
        if rules.match is None:
            exact[key] = {EM: float(answers[0] in references[key])}
        else:
            equal, refined = rules.match(candidates[key], normalized[key])
            exact[key] = {EM: float(equal), EM_REFINED: float(refined)}
        if rules.ranked:
            hit = bool(set(answers[:10]) & set(references[key]))
            exact[key][EM_AT_10] = float(hit) if has_ranked else None
    return exact, {EM_AT_10: "No prediction has a second answer."} if rules.ranked and not has_ranked else {}


def _mean(values: Sequence[MetricValue]) -> MetricValue:
    """The arithmetic mean; None if a value is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


class ScanQaRecord(RecordFields):
    """Fields of a record that ScanQA's protocols read."""

    references: list[ReferenceFields]


def _inputs(records: Sequence[AnswerRecord], _: Proposals | None) -> tuple[Any, ...]:
    """References and predictions, as arguments of `score_scanqa`."""
    references = {record["id"]: [reference["text"] for reference in record["references"]] for record in records}
    predictions = {record["id"]: [record["text"]] for record in records if record["text"] is not None}
    return references, predictions


for _name, _rules in SCANQA_RULES.items():
    _exact = (EM,) if _rules.match is None else (EM, EM_REFINED)
    register_protocol(
        Protocol(
            name=f"scanqa/{_name}",
            description=_rules.description,
            source=_rules.source,
            score=partial(score_scanqa, protocol=_name),
            metrics={metric: ("corpus", metric) for metric in (*_exact, *PAPER_METRICS)},
            best_by=EM,
            inputs=_inputs,
            record_model=ScanQaRecord,
            default=_name == "video3dllm",
            item_terms=answer_terms,
        )
    )
