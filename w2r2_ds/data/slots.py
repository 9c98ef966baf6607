"""Answer slots: which label tokens are the digits of which number.

A grounding answer holds ten numbers: the frame index and the nine box values. Their digits are the *where* tokens.
Requires a tokenizer that gives every digit a token of its own, as Qwen's do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

NUMBERS = 10
"""Frame index and nine box values."""

_NUMBER = re.compile(r"(?<![\w.])(-?)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class AnswerSlots:
    """Slots of one answer; indices count the answer's own tokens from 0.

    Attributes:
        where: ``[tokens]`` bool, digits of a number.
        lead: ``[NUMBERS]`` the token before a number's first digit, which carries its sign.
        tokens: ``NUMBERS`` lists of the tokens of digits and decimal point.
        places: the same lists with each digit's unit (10, 1, 0.1, ...), 0 for the decimal point.
    """

    where: np.ndarray
    lead: np.ndarray
    tokens: list[list[int]]
    places: list[list[float]]


def grounding_slots(answer: str, offsets: list[tuple[int, int]]) -> AnswerSlots:
    """Slots of a grounding answer from its text and its tokens' character offsets.

    Raises:
        ValueError: the answer does not hold ten numbers, or the tokenizer does not split digits.
    """
    matches = list(_NUMBER.finditer(answer))
    if len(matches) != NUMBERS:
        raise ValueError(
            f"A grounding answer holds {NUMBERS} numbers (frame and box); this has {len(matches)}: {answer!r}."
        )
    start_of = {begin: index for index, (begin, end) in enumerate(offsets) if end > begin}
    where = np.zeros(len(offsets), dtype=bool)
    lead = np.zeros(NUMBERS, dtype=np.int64)
    tokens: list[list[int]] = []
    places: list[list[float]] = []
    for number, match in enumerate(matches):
        begin, end = match.span(2)
        indices = [start_of.get(character, -1) for character in range(begin, end)]
        if -1 in indices or any(offsets[i][1] - offsets[i][0] != 1 for i in indices):
            raise ValueError(
                f"The tokenizer does not give every digit its own token (number {match.group()!r}); "
                "answer slots need one that splits digits, as Qwen's does."
            )
        if indices[0] == 0:
            raise ValueError(f"A number must not begin the answer, a sign has no place there: {answer!r}.")
        digits, _, _ = match.group(2).partition(".")
        lead[number] = indices[0] - 1
        tokens.append(indices)
        places.append(_places(match.group(2), len(digits)))
        where[[i for i, place in zip(indices, places[-1], strict=True) if place > 0]] = True
    return AnswerSlots(where, lead, tokens, places)


def _places(text: str, integer_digits: int) -> list[float]:
    """Unit of every character of a number, 0 for the decimal point: ``"12.3"`` -> ``[10, 1, 0, 0.1]``."""
    result = []
    exponent = integer_digits - 1
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
        digit: ``[vocabulary]`` int64, 0 to 9 for the ten digit tokens, -1 for every other.
        minus: ``[vocabulary]`` bool, the token's text ends with a minus sign.
    """

    digit: torch.Tensor
    minus: torch.Tensor

    def to(self, device: torch.device) -> TokenTables:
        """The same tables on another device."""
        return TokenTables(self.digit.to(device), self.minus.to(device))


def token_tables(tokenizer, rows: int) -> TokenTables:  # type: ignore[no-untyped-def]
    """Tables for a tokenizer whose model has `rows` output rows (padding rows mean nothing)."""
    digit = torch.full((rows,), -1, dtype=torch.int64)
    minus = torch.zeros(rows, dtype=torch.bool)
    for text, index in tokenizer.get_vocab().items():
        if index < rows:
            minus[index] = text.endswith("-")
            if len(text) == 1 and text.isascii() and text.isdigit():
                digit[index] = int(text)
    if len(set(digit.tolist()) - {-1}) != 10:
        raise ValueError("The tokenizer has no token for each of the ten digits; answer slots need them.")
    return TokenTables(digit, minus)
