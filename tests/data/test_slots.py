"""Slots point at the digits of ten numbers, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from w2r2_ds.data.slots import grounding_slots, token_tables
from w2r2_ds.models.tiny import train_tokenizer

ANSWER = '```json\n\t{"frame": 12, "bbox_3d": [-0.63, 0.83, 12.4, 3.0, 0.59, 2.35, -2.32, 1.18, -0.0]}\n```'
NUMBERS = ["12", "0.63", "0.83", "12.4", "3.0", "0.59", "2.35", "2.32", "1.18", "0.0"]
SIGNS = "+-+++++-+-"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([ANSWER] * 3)


def encode(tokenizer: Any, answer: str) -> tuple[list[str], list[tuple[int, int]]]:
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"]


def test_numbers_places_and_signs(tokenizer: Any) -> None:
    tokens, offsets = encode(tokenizer, ANSWER)
    slots = grounding_slots(ANSWER, offsets)
    assert ["".join(tokens[i] for i in indices) for indices in slots.tokens] == NUMBERS
    assert slots.places[0] == [10, 1]
    assert slots.places[3] == pytest.approx([10, 1, 0, 0.1])
    assert slots.places[1] == pytest.approx([1, 0, 0.1, 0.01])
    assert ["-" if tokens[i].endswith("-") else "+" for i in slots.lead] == list(SIGNS)


def test_where_is_exactly_the_digits_of_the_numbers(tokenizer: Any) -> None:
    tokens, offsets = encode(tokenizer, ANSWER)
    where = grounding_slots(ANSWER, offsets).where
    chosen = [token for token, flag in zip(tokens, where, strict=True) if flag]
    assert "".join(chosen) == "".join(NUMBERS).replace(".", "")
    three = tokens.index("3")  # of bbox_3d
    assert tokens[three + 1].startswith("d") and not where[three]


@pytest.mark.parametrize("answer", ["", '{"frame": 1}', ANSWER.replace("3.0, ", ""), ANSWER + " 7"])
def test_other_than_ten_numbers(tokenizer: Any, answer: str) -> None:
    with pytest.raises(ValueError, match="holds 10 numbers"):
        grounding_slots(answer, encode(tokenizer, answer)[1])


def test_merged_digits_are_named(tokenizer: Any) -> None:
    _, offsets = encode(tokenizer, ANSWER)
    first = next(i for i, (begin, _) in enumerate(offsets) if ANSWER[begin:].startswith("12,"))
    merged = [*offsets[:first], (offsets[first][0], offsets[first + 1][1]), *offsets[first + 2 :]]
    with pytest.raises(ValueError, match=r"every digit its own token \(number '12'\)"):
        grounding_slots(ANSWER, merged)
    with_space = [*offsets[: first - 1], (offsets[first - 1][0], offsets[first][1]), *offsets[first + 1 :]]
    with pytest.raises(ValueError, match=r"number '12'"):
        grounding_slots(ANSWER, with_space)


def test_a_number_at_the_very_beginning_has_no_place_for_a_sign() -> None:
    answer = "1 2 3 4 5 6 7 8 9 0"
    with pytest.raises(ValueError, match="must not begin the answer"):
        grounding_slots(answer, [(i, i + 1) for i in range(len(answer))])


def test_tables(tokenizer: Any) -> None:
    tables = token_tables(tokenizer, 1000)
    for digit in range(10):
        assert tables.digit[tokenizer.convert_tokens_to_ids(str(digit))] == digit
    assert (tables.digit >= 0).sum() == 10
    assert tables.minus[tokenizer.convert_tokens_to_ids("-")]
    assert not tables.minus[len(tokenizer) :].any() and not tables.minus[tokenizer.convert_tokens_to_ids("[")]


def test_tables_need_ten_digits() -> None:
    class Words:
        def get_vocab(self) -> dict[str, int]:
            return {"1": 0, "12": 1, "²": 2}

    with pytest.raises(ValueError, match="ten digits"):
        token_tables(Words(), 3)
