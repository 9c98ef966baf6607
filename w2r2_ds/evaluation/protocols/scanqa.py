"""ScanQA: short answers against several references, as five public evaluators score them.

They differ in what is done to the texts before anything is compared: nothing, full stops off, or ``clean_answer`` on
one or both sides; and in whether captions go through the PTB tokenizer. All divide by the number of questions here: one
without a prediction is answered by the empty text. (The official script stops at it; Video-3D-LLM leaves it out of the
denominator, which raises its scores.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from w2r2_ds.evaluation.metrics.captions import Score, Tokenizer, score_captions

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
    # 21 and 22 stay as they are.
    "23": "twenty-three",
    "none": "zero",
}
_WORD = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r")\b")
_TRAILING_DIGIT = re.compile(r"\b([a-zA-Z]+)[0-9]\b")
# One after the other, and each takes the next word with it: of "the the chair" one "the" stays.
_ARTICLES = tuple(re.compile(rf"\b{article} ([a-zA-Z]+)") for article in ("a", "an", "the"))


def clean_answer(text: str) -> str:
    """An answer in lower case without articles, with number words, a few typos mended.

    Lower case; blanks at the ends off, runs of blanks made one; characters other than letters, digits, white space and
    ``, ' - :`` deleted (so "2.5 m" becomes "25 m", "café" "caf", and blanks uncovered by this stay); typos mended;
    "tv" -> "TV"; 0..20 and 23 -> words, "none" -> "zero"; one digit behind a word off; "a", "an", "the" before a word
    off.
    """
    text = re.sub(" +", " ", text.lower().strip(" "))
    text = _STRIPPED.sub("", text)
    text = _WORD.sub(lambda found: _WORDS[found.group()], text)
    text = _TRAILING_DIGIT.sub(r"\1", text)
    for article in _ARTICLES:
        text = article.sub(r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def match_any(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """(EM, EM-refined), looking for an equal answer among all first (VLM-3R)."""
    if prediction in answers:
        return 1, 1
    return 0, int(any(_contain(prediction, answer) for answer in answers))


def match_in_order(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """(EM, EM-refined) of the first answer that matches at all (LEO).

    "brown" against ["dark brown", "brown"] is therefore (0, 1), and (1, 1) if the answers are turned round.
    """
    for answer in answers:
        if prediction == answer:
            return 1, 1
        if _contain(prediction, answer):
            return 0, 1
    return 0, 0


def match_nonempty(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """``match_any``, but an empty prediction matches nothing (Chat-Scene)."""
    return match_any(prediction, answers) if prediction else (0, 0)


def _contain(first: str, second: str) -> bool:
    first, second = "".join(first.split()), "".join(second.split())
    return first in second or second in first


Match = Callable[[str, Sequence[str]], tuple[int, int]]
EM, EM_REFINED, EM_AT_10 = "EM", "EM-refined", "EM@10"


@dataclass(frozen=True)
class Rules:
    """What one evaluator does.

    Attributes:
        prediction: what becomes of a prediction before it is scored as a caption.
        answer: what becomes of each reference answer.
        match: (EM, EM-refined) of the two; None where the evaluator compares the raw texts and knows no refined EM.
        tokenizer: what captions go through last.
        ranked: whether ten ranked answers are looked at (EM@10).
    """

    prediction: Callable[[str], str]
    answer: Callable[[str], str]
    match: Match | None
    tokenizer: Tokenizer
    ranked: bool = False


def _as_it_is(text: str) -> str:
    return text


def _without_full_stops(text: str) -> str:
    return text.rstrip(".")


def _chatscene(text: str) -> str:
    """One full stop off, first letter lower, then ``clean_answer``."""
    text = text.removesuffix(".")
    return clean_answer(text[:1].lower() + text[1:])


PROTOCOLS: Mapping[str, Rules] = {
    # ATR-DBI/ScanQA scripts/score.py: evals_json, eval_pycoco (its F-value and SPICE are not computed)
    "scanqa_official": Rules(_as_it_is, _as_it_is, None, "ptb", ranked=True),
    # LaVi-Lab/Video-3D-LLM llava/eval/eval_scanqa.py: main
    # diankun-wu/Spatial-MLLM src/evaluation/scanqa/score_scanqa.py
    "video3dllm": Rules(_without_full_stops, _as_it_is, None, "none"),
    # embodied-generalist evaluator/scanqa_eval.py: ScanQAEvaluator.update
    "leo": Rules(clean_answer, clean_answer, match_in_order, "none"),
    # VITA-Group/VLM-3R llava/eval/scanqa_evaluator.py: answer_match, calc_scanqa_score
    "vlm3r": Rules(clean_answer, clean_answer, match_any, "ptb"),
    # ZzZZCHS/Chat-Scene utils/eval.py: calc_scanqa_score
    "chatscene": Rules(_chatscene, _as_it_is, match_nonempty, "ptb"),
}


def score_scanqa(
    questions: Mapping[str, Sequence[str]],
    predictions: Mapping[str, Sequence[str]],
    protocol: str,
    java: Java | None = None,
) -> dict[str, Any]:
    """EM, EM-refined and caption metrics.

    Args:
        questions: question id -> its reference answers.
        predictions: question id -> answers, best first; a model that gives one answer gives a list of one.
        protocol: one of ``PROTOCOLS``.
        java: see ``score_captions``.

    Returns:
        ``protocol``, ``questions``, ``missing`` (how many have no prediction), ``corpus``, ``items``, ``candidates``,
        ``references``, ``not_computed`` (see ``CaptionScores``), with ``EM`` and, where the protocol has them,
        ``EM-refined`` or ``EM@10`` among the scores. EM@10 is None where no prediction has a second answer.

    Raises:
        ValueError: unknown protocol, a question without answers (the test split), a prediction of no question.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"ScanQA has no protocol {protocol!r}; it is one of {', '.join(PROTOCOLS)}.")
    _check(questions, predictions)
    rules = PROTOCOLS[protocol]
    ranked = {key: list(predictions.get(key, ())) or [""] for key in questions}
    candidates = {key: rules.prediction(answers[0]) for key, answers in ranked.items()}
    references = {key: [rules.answer(text) for text in answers] for key, answers in questions.items()}
    scores = score_captions(references, candidates, rules.tokenizer, java)

    exact: dict[str, dict[str, Score]]
    if rules.match is None:
        exact = {key: {EM: float(answers[0] in questions[key])} for key, answers in ranked.items()}
    else:
        exact = {}
        for key, text in candidates.items():
            found, refined = rules.match(text, references[key])
            exact[key] = {EM: float(found), EM_REFINED: float(refined)}
    reasons = dict(scores.not_computed)
    if rules.ranked:
        several = any(len(answers) > 1 for answers in ranked.values())
        for key, answers in ranked.items():
            hit = bool(set(answers[:10]) & set(questions[key]))
            exact[key][EM_AT_10] = float(hit) if several else None
        if not several:
            reasons[EM_AT_10] = "No prediction has a second answer."
    corpus = {name: _mean([item[name] for item in exact.values()]) for name in next(iter(exact.values()))}
    return {
        "protocol": protocol,
        "questions": len(questions),
        "missing": sum(key not in predictions for key in questions),
        "corpus": corpus | scores.corpus,
        "items": {key: exact[key] | item for key, item in scores.items.items()},
        "candidates": scores.candidates,
        "references": scores.references,
        "not_computed": reasons,
    }


def _mean(values: Sequence[Score]) -> Score:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _check(questions: Mapping[str, Sequence[str]], predictions: Mapping[str, Sequence[str]]) -> None:
    if not questions:
        raise ValueError("There are no questions to score.")
    bare = [key for key, answers in questions.items() if not answers]
    if bare:
        raise ValueError(
            f"{len(bare)} questions have no answers, the first is {bare[0]!r}; the test split cannot be scored here."
        )
    strange = sorted(predictions.keys() - questions.keys())
    if strange:
        raise ValueError(f"{len(strange)} predictions answer no question, the first is {strange[0]!r}.")
    text = next((key for key, answers in predictions.items() if isinstance(answers, str)), None)
    if text is not None:
        raise ValueError(f"The prediction of {text!r} must be a list of answers, best first, not one text.")
