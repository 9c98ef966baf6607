"""LEO's normalisation of ScanQA answers, and the three ways in which an answer is matched.

Sources: embodied-generalist/embodied-generalist ``data/data_utils.py`` (``clean_answer``) and
``evaluator/scanqa_eval.py`` (its match loop); VITA-Group/VLM-3R ``llava/eval/scanqa_evaluator.py`` and
ZzZZCHS/Chat-Scene ``utils/helper.py`` carry the same normalisation with other match loops.

EM is 1 for an equal answer. EM-refined is 1 for EM, or where one text contains the other, blanks taken out; so an empty
prediction is contained in every answer, and "no" in "nothing".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
