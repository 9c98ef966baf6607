"""Find the *where* tokens (digits of the box) of an answer and the *what* tokens of a prompt, by character offsets.

A grounding answer holds ten numbers: the frame index and the nine box values. Their digits are the *where* tokens; JSON
syntax, signs and decimal points are in neither set. Where the tokenizer gives every digit a token of its own,
a number's digit tokens, their units and the token with its sign are found too.

Offsets are ``[(begin, end), ...]`` per token, in characters of the encoded text. Characters that no token covers (a
blank that a tokenizer trims) belong to the token after them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from w2r2_ds.types.sample import Kind

NUMBERS = 10
"""Frame index and nine box values."""

Offsets = Sequence[tuple[int, int]]

_NUMBER = re.compile(r"(?<![\w.])(-?)([0-9]+(?:\.[0-9]+)?)")
_DIGIT = re.compile("[0-9]")
_DIGIT_OR_HYPHEN = re.compile("[0-9-]")


@dataclass(frozen=True)
class AnswerTokens:
    """Digit tokens and numbers of one answer; indices count the answer's own tokens from 0.

    A token that holds a digit belongs to that digit's number, whatever else it holds (`` 0``, ``12``, ``0.5``, ``2]``):
    dropping it would lose the digit. A token with digits of two numbers belongs to the first.

    Attributes:
        where: ``[tokens]`` bool: grounding: tokens with a digit of a number; else all but the end of turn.
        number: ``[tokens]`` int64, the number whose digits a token holds; -1 for every other token.
        single_digits: every digit of every number is a token of its own, without even a blank beside it; False if
            there are no numbers. The fields below are empty if this is False.
        sign: ``[NUMBERS]`` int64, the token before a number's first digit, which carries its sign.
        digits: ``NUMBERS`` lists: the tokens of a number's digits and decimal point.
        place_values: the same lists with each digit's place value (10, 1, 0.1, ...), 0 for the decimal point.
    """

    where: np.ndarray
    number: np.ndarray
    single_digits: bool
    sign: np.ndarray
    digits: list[list[int]]
    place_values: list[list[float]]


def find_answer_tokens(kind: Kind, answer: str, offsets: Offsets) -> AnswerTokens:
    """Digit tokens of an answer from its text and the offsets of its tokens, the end of turn among them.

    Any tokenizer will do; one that merges digits gives `where` and `number`, but no single digits.

    Raises:
        ValueError: an unknown kind, or a grounding answer that does not hold ten numbers or begins with one.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"A sample's kind is {kind!r}; it is one of {', '.join(get_args(Kind))}.")
    if kind == "grounding":
        return _grounding_tokens(answer, _whole(offsets))
    where = np.array([begin < len(answer) for begin, _ in offsets], dtype=bool)
    return AnswerTokens(where, np.full(len(where), -1, dtype=np.int64), False, np.zeros(0, dtype=np.int64), [], [])


def what_tokens(span: tuple[int, int], offsets: Offsets) -> np.ndarray:
    """``[tokens]`` bool: tokens that share a character with ``[begin, end)``; a leading blank belongs to its token."""
    begin, end = span
    return np.array([max(first, begin) < min(last, end) for first, last in _whole(offsets)], dtype=bool)


def _whole(offsets: Offsets) -> list[tuple[int, int]]:
    """Offsets in which a token also covers what lies between it and the tokens before it."""
    result, covered = [], 0
    for begin, end in offsets:
        result.append((min(begin, covered), end))
        covered = max(covered, end)
    return result


def _grounding_tokens(answer: str, offsets: Offsets) -> AnswerTokens:
    matches = list(_NUMBER.finditer(answer))
    if len(matches) != NUMBERS:
        raise ValueError(
            f"A grounding answer holds {NUMBERS} numbers (frame and box); this has {len(matches)}: {answer!r}."
        )
    if matches[0].start(2) == 0:
        raise ValueError(f"A number must not begin the answer, a sign has no place there: {answer!r}.")
    owner = {
        character: index
        for index, match in enumerate(matches)
        for character in range(*match.span(2))
        if answer[character] != "."
    }
    number = np.array(
        [next((owner[c] for c in range(begin, end) if c in owner), -1) for begin, end in offsets], dtype=np.int64
    )
    alone = {begin: index for index, (begin, end) in enumerate(offsets) if end == begin + 1}
    tokens = [[alone.get(character, -1) for character in range(*match.span(2))] for match in matches]
    if any(-1 in indices for indices in tokens):
        return AnswerTokens(number >= 0, number, False, np.zeros(0, dtype=np.int64), [], [])
    lead = np.array([indices[0] - 1 for indices in tokens], dtype=np.int64)
    return AnswerTokens(number >= 0, number, True, lead, tokens, [_places(match.group(2)) for match in matches])


def _places(text: str) -> list[float]:
    """Unit of every character of a number, 0 for the decimal point: ``"12.3"`` -> ``[10, 1, 0, 0.1]``."""
    result = []
    exponent = len(text.partition(".")[0]) - 1
    for character in text:
        if character == ".":
            result.append(0.0)
        else:
            result.append(10.0**exponent)
            exponent -= 1
    return result


@dataclass(frozen=True)
class TokenTables:
    """What a predicted token means inside a number.

    Attributes:
        digit: ``[vocabulary]`` int64, 0 to 9 for every token that is one digit, with or without blanks (``1``;
            SentencePiece also has ``▁1`` and the byte ``<0x31>``); -1 for every other token.
        minus: ``[vocabulary]`` bool, the token's text ends with a minus sign.
    """

    digit: torch.Tensor
    minus: torch.Tensor

    def to(self, device: torch.device) -> TokenTables:
        """The same tables on another device."""
        return TokenTables(self.digit.to(device), self.minus.to(device))


def token_tables(tokenizer: Any, rows: int) -> TokenTables:
    """Tables for a tokenizer whose model has `rows` output rows (padding rows mean nothing).

    Any tokenizer will do; one without digit tokens has no digits here, and `require_digit_tokens` refuses it.
    """
    digit = torch.full((rows,), -1, dtype=torch.int64)
    minus = torch.zeros(rows, dtype=torch.bool)
    for spelling, index in tokenizer.get_vocab().items():
        # Only what is spelled with a digit or a hyphen can read as one, bytes (<0x2D>) too: decoding all takes seconds.
        if index < rows and _DIGIT_OR_HYPHEN.search(spelling):
            text = tokenizer.decode([index])
            minus[index] = text.endswith("-")
            if _DIGIT.fullmatch(text.strip()):
                digit[index] = int(text)
    return TokenTables(digit, minus)


def require_digit_tokens(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that does not give every digit a token of its own; `what` names the option that needs it.

    Asks the tokenizer itself, before training: every number with two decimals between -20 and 20, frames up to 443, in
    answers of the usual form.

    Raises:
        ValueError: it merges a digit with another character, or a digit's token does not read as that digit.
    """
    digit = token_tables(tokenizer, max(tokenizer.get_vocab().values()) + 1).digit
    for answer in _probes():
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], _whole(encoded["offset_mapping"])
        found = find_answer_tokens("grounding", answer, offsets)
        for index in np.flatnonzero(found.where).tolist():
            text = answer[slice(*offsets[index])]
            if not _DIGIT.fullmatch(text) or int(text) != digit[ids[index]]:
                raise ValueError(
                    f"{what} needs a tokenizer that gives every digit a token of its own; "
                    f"{type(tokenizer).__name__} makes {text!r} in {answer!r} the one token "
                    f"{tokenizer.convert_ids_to_tokens(ids[index])!r}. Choose another option or another model."
                )


def _probes() -> Iterator[str]:
    """Grounding answers that hold every number with two decimals between -20 and 20."""
    values = [f"{hundredths / 100:.2f}" for hundredths in range(-1999, 2000)]
    for frame in range(len(values) // (NUMBERS - 1)):
        box = values[frame * (NUMBERS - 1) : (frame + 1) * (NUMBERS - 1)]
        yield f'{{"frame": {frame}, "bbox_3d": [{", ".join(box)}]}}'
