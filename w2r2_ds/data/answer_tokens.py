"""Find *where* tokens (digits of a box) in an answer and *what* tokens (the description) in a prompt.

A grounding answer contains the numbers of its box format: frame index and nine box values, or the two corners of a
world box. Their digits are the *where* tokens; JSON syntax, commas, signs and decimal points are neither *where* nor
*what*. If the tokenizer encodes every digit as a token of its own, the digit tokens of every number, their place values
and the token with the sign are found too.

The label mask (which tokens are the answer) is in `answer_labels.py`.

Tokens are found by the tokenizer's offsets: ``(begin, end)`` per token, in characters of the encoded text. Characters
that no token covers (a space that a tokenizer trims) count as part of the next token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import torch

from w2r2_ds.types.sample import BoxFormat, Kind

NUMBERS: dict[BoxFormat, int] = {"camera": 10, "world": 6}
"""Number of numbers of a grounding answer: frame index and nine box values, or two corners."""

MAX_NUMBERS = max(NUMBERS.values())
"""Size of the tensors that have one entry per number; those of a shorter format are padded."""

Offsets = Sequence[tuple[int, int]]
"""Characters ``[begin, end)`` of every token; a fast tokenizer's ``offset_mapping``."""

_NUMBER = re.compile(r"(?<![\w.])(-?)([0-9]+(?:\.[0-9]+)?)")
_DIGIT = re.compile("[0-9]")
_DIGIT_OR_HYPHEN = re.compile("[0-9-]")


@dataclass(frozen=True)
class AnswerTokens:
    """Digit tokens of one answer. Token indices are relative to the answer.

    A token with a digit belongs to that digit's number, also if it contains other characters (`` 0``, ``12``, ``0.5``,
    ``2]``). A token with digits of two numbers belongs to the first.

    Attributes:
        where: ``[tokens]`` bool, *where* tokens. Grounding: tokens with a digit of a number. Other kinds: all tokens
            but the end of turn.
        number: ``[tokens]`` int64, index of the number whose digits the token contains; -1 for other tokens.
        single_digits: True if every digit and decimal point of every number is a token of its own, without even a
            space beside it; False if there are no numbers. The fields below are empty if this is False.
        sign: ``[numbers]`` int64, the token at which the sign is predicted: the token before the first digit, or the
            first digit itself if the answer begins with it.
        digits: one list per number: the tokens of its digits and decimal point.
        place_values: one list per number: place value of each of these tokens (10, 1, 0.1, ...), 0 for the decimal
            point.
    """

    where: np.ndarray
    number: np.ndarray
    single_digits: bool
    sign: np.ndarray
    digits: list[list[int]]
    place_values: list[list[float]]


def find_answer_tokens(kind: Kind, answer: str, offsets: Offsets, box_format: BoxFormat = "camera") -> AnswerTokens:
    """Find the *where* tokens and the digit tokens of an answer.

    Works with any tokenizer. If it merges digits, `where` and `number` are set and `single_digits` is False.

    Args:
        kind: kind of the answer.
        answer: text of the answer, without the end of turn.
        offsets: character offsets of all tokens of the answer, including the end of turn.
        box_format: numbers of a grounding answer.

    Raises:
        ValueError: the kind or the box format is unknown, or a grounding answer has another number of numbers than its
            box format.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"A sample's kind is {kind!r}; it is one of {', '.join(get_args(Kind))}.")
    if kind == "grounding":
        return _grounding_tokens(answer, _covering(offsets), box_format)
    where = np.array([begin < len(answer) for begin, _ in offsets], dtype=bool)
    return AnswerTokens(where, np.full(len(where), -1, dtype=np.int64), False, np.zeros(0, dtype=np.int64), [], [])


def what_tokens(span: tuple[int, int], offsets: Offsets) -> np.ndarray:
    """Mask ``[tokens]`` bool of the tokens that overlap `span`, characters ``[begin, end)`` of the encoded text."""
    begin, end = span
    return np.array([max(first, begin) < min(last, end) for first, last in _covering(offsets)], dtype=bool)


def _covering(offsets: Offsets) -> list[tuple[int, int]]:
    """Offsets in which each token also covers the characters between it and the tokens before it."""
    result, covered = [], 0
    for begin, end in offsets:
        result.append((min(begin, covered), end))
        covered = max(covered, end)
    return result


def _grounding_tokens(answer: str, offsets: Offsets, box_format: BoxFormat) -> AnswerTokens:
    """`find_answer_tokens` of a grounding answer; `offsets` as `_covering` returns them."""
    if box_format not in NUMBERS:
        raise ValueError(f"A sample's box_format is {box_format!r}; it is one of {', '.join(NUMBERS)}.")
    matches = list(_NUMBER.finditer(answer))
    if len(matches) != NUMBERS[box_format]:
        raise ValueError(
            f"A grounding answer of box_format {box_format} has {NUMBERS[box_format]} numbers; this one has "
            f"{len(matches)}: {answer!r}."
        )
    # Position of a digit in the text -> index of its number. A token belongs to the number of its first digit.
    number_at = {
        character: index
        for index, match in enumerate(matches)
        for character in range(*match.span(2))
        if answer[character] != "."
    }
    number = np.array(
        [next((number_at[c] for c in range(begin, end) if c in number_at), -1) for begin, end in offsets],
        dtype=np.int64,
    )
    # SentencePiece may put a token for a space before a text, with the offsets of the first character. It has no digit:
    # the next token covers all of its characters.
    for index, ((begin, end), (next_begin, next_end)) in enumerate(pairwise(offsets)):
        if next_begin <= begin and end <= next_end:
            number[index] = -1
    # Position of a character in the text -> the last token that is this one character. The tokens are single digits if
    # every digit and decimal point has one.
    single = {begin: index for index, (begin, end) in enumerate(offsets) if end == begin + 1}
    digits = [[single.get(character, -1) for character in range(*match.span(2))] for match in matches]
    if any(-1 in tokens for tokens in digits):
        return AnswerTokens(number >= 0, number, False, np.zeros(0, dtype=np.int64), [], [])
    # The token before the first digit carries the sign: for a negative number it ends with the minus (``-``, `` -`` or
    # ``,-``). An answer that begins with a digit has no such token. There, a minus would be predicted instead of that
    # digit, so this is the token of the sign. (A negative number at the beginning has its minus before its digits.)
    sign = np.array([max(tokens[0] - 1, 0) for tokens in digits], dtype=np.int64)
    return AnswerTokens(number >= 0, number, True, sign, digits, [_place_values(match.group(2)) for match in matches])


def _place_values(text: str) -> list[float]:
    """Place value of every character of a number, 0 for the decimal point: ``"12.3"`` -> ``[10, 1, 0, 0.1]``."""
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
    """Digit and sign of every token of a vocabulary, to convert predicted tokens to numbers.

    Attributes:
        digit: ``[vocabulary]`` int64, 0 to 9 for a token that is one digit, with or without spaces (``1``; with
            SentencePiece also ``▁1`` and the byte ``<0x31>``); -1 for other tokens.
        minus: ``[vocabulary]`` bool, True if the token's text ends with a minus sign.
    """

    digit: torch.Tensor
    minus: torch.Tensor

    def to(self, device: torch.device) -> TokenTables:
        """The tables on `device`."""
        return TokenTables(self.digit.to(device), self.minus.to(device))


def token_tables(tokenizer: Any, vocabulary: int) -> TokenTables:
    """Build the tables for a tokenizer.

    Works with any tokenizer. If it has no digit tokens, `digit` is -1 everywhere; `require_digit_tokens` then raises.

    Args:
        tokenizer: tokenizer of the VLM.
        vocabulary: length of the tables: size of the LM head, which may exceed the tokenizer's vocabulary.
    """
    digit = torch.full((vocabulary,), -1, dtype=torch.int64)
    minus = torch.zeros(vocabulary, dtype=torch.bool)
    for spelling, index in tokenizer.get_vocab().items():
        # Decoding the whole vocabulary takes seconds. Every token that decodes to a digit or ends with a minus sign has
        # a digit or a hyphen in its spelling, byte tokens (<0x2D>) too; only those tokens are decoded.
        if index < vocabulary and _DIGIT_OR_HYPHEN.search(spelling):
            text = tokenizer.decode([index])
            minus[index] = text.endswith("-")
            if _DIGIT.fullmatch(text.strip()):
                digit[index] = int(text)
    return TokenTables(digit, minus)


def require_digit_tokens(tokenizer: Any, what: str) -> None:
    """Raise ValueError unless a tokenizer encodes every digit as a token of its own.

    The check, made before training, encodes grounding answers of both box formats that contain every number with two
    decimals between -20 and 20, and frame indices up to 443.

    Args:
        tokenizer: tokenizer of the VLM.
        what: the option that needs digit tokens, for the message.

    Raises:
        ValueError: a digit is merged with another character, or its token does not decode to that digit.
    """
    digit = token_tables(tokenizer, max(tokenizer.get_vocab().values()) + 1).digit
    for answer, box_format in _probe_answers():
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], _covering(encoded["offset_mapping"])
        found = find_answer_tokens("grounding", answer, offsets, box_format)
        for index in np.flatnonzero(found.where).tolist():
            text = answer[slice(*offsets[index])]
            if not _DIGIT.fullmatch(text) or int(text) != digit[ids[index]]:
                raise ValueError(
                    f"{what} needs a tokenizer that gives every digit a token of its own; "
                    f"{type(tokenizer).__name__} makes {text!r} in {answer!r} the one token "
                    f"{tokenizer.convert_ids_to_tokens(ids[index])!r}. Choose another option or another model."
                )


def _probe_answers() -> Iterator[tuple[str, BoxFormat]]:
    """Grounding answers of each box format that contain every number with two decimals between -20 and 20."""
    values = [f"{hundredths / 100:.2f}" for hundredths in range(-1999, 2000)]
    for frame, begin in enumerate(range(0, len(values) - 8, 9)):
        yield f'{{"frame": {frame}, "bbox_3d": [{", ".join(values[begin : begin + 9])}]}}', "camera"
    for begin in range(0, len(values) - 5, 6):
        yield ",".join(values[begin : begin + 6]), "world"
