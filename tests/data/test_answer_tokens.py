"""Answer tokens from hand-written offsets: the tokens of every number, for any tokenization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from w2r2_ds.data.answer_tokens import find_answer_tokens, require_digit_tokens, token_tables, what_tokens
from w2r2_ds.data.tasks.scanrefer import description_span, question_text
from w2r2_ds.demo.tiny_models import train_tokenizer

ANSWER = '```json\n\t{"frame": 12, "bbox_3d": [-0.63, 0.83, 12.4, 3.0, 0.59, 2.35, -2.32, 1.18, -0.0]}\n```'
NUMBERS = ["12", "0.63", "0.83", "12.4", "3.0", "0.59", "2.35", "2.32", "1.18", "0.0"]
SIGNS = "+-+++++-+-"
PLAIN = '{"f": 7, "b_3d": [-0.5, 1, 2, 3, 4, 5, 6, 7, 81]}'
MARKS = "......0............1.1..2..3..4..5..6..7..8..99.."
"""The number of every character of PLAIN."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([ANSWER] * 3)


def encode(tokenizer: Any, answer: str) -> tuple[list[str], list[tuple[int, int]]]:
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["offset_mapping"]


def offsets_of(pieces: list[str]) -> list[tuple[int, int]]:
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    return list(zip([0, *ends], ends, strict=False))


def test_numbers_place_values_and_signs(tokenizer: Any) -> None:
    tokens, offsets = encode(tokenizer, ANSWER)
    found = find_answer_tokens("grounding", ANSWER, offsets)
    assert found.single_digits
    assert ["".join(tokens[i] for i in indices) for indices in found.digits] == NUMBERS
    assert found.place_values[0] == [10, 1]
    assert found.place_values[3] == pytest.approx([10, 1, 0, 0.1])
    assert found.place_values[1] == pytest.approx([1, 0, 0.1, 0.01])
    assert ["-" if tokens[i].endswith("-") else "+" for i in found.sign] == list(SIGNS)


def test_where_is_exactly_the_digits_of_the_numbers(tokenizer: Any) -> None:
    tokens, offsets = encode(tokenizer, ANSWER)
    where = find_answer_tokens("grounding", ANSWER, offsets).where
    chosen = [token for token, flag in zip(tokens, where, strict=True) if flag]
    assert "".join(chosen) == "".join(NUMBERS).replace(".", "")
    three = tokens.index("3")  # of bbox_3d
    assert tokens[three + 1].startswith("d") and not where[three]


def test_one_token_per_character() -> None:
    found = find_answer_tokens("grounding", PLAIN, offsets_of(list(PLAIN)))
    assert "".join("." if n < 0 else str(n) for n in found.number) == MARKS
    assert [m != "." for m in MARKS] == found.where.tolist()
    assert found.single_digits and found.sign.tolist() == [5, 18, 23, 26, 29, 32, 35, 38, 41, 44]
    assert found.digits == [[6], [19, 20, 21], [24], [27], [30], [33], [36], [39], [42], [45, 46]]
    assert found.place_values[1] == [1, 0, 0.1] and found.place_values[9] == [10, 1] and found.place_values[0] == [1]


@pytest.mark.parametrize(
    ("pieces", "number"),
    [
        (['{"f":', " 7", ', "b_3d": [-', "0.5", ",", " 1"], [-1, 0, -1, 1, -1, 2]),  # digits and spaces merge
        (['{"f": ', "7,", ' "b_3', 'd": [', "-0", ".", "5,", " 1"], [-1, 0, -1, -1, 1, -1, 1, 2]),  # and JSON syntax
        (['{"f": 7, "b_3d": [-', "0", ".5, ", "1"], [0, 1, 1, 2]),
        (['{"f": ', "7", ', "b_3d": [-', "0", ".", "5, 1"], [-1, 0, -1, 1, -1, 1]),  # two numbers: the first one's
    ],
)
def test_a_token_belongs_to_the_number_of_its_digits(pieces: list[str], number: list[int]) -> None:
    begun = "".join(pieces)
    assert PLAIN.startswith(begun)
    rest = list(PLAIN[len(begun) :])
    found = find_answer_tokens("grounding", PLAIN, offsets_of([*pieces, *rest]))
    tail = [-1 if m == "." else int(m) for m in MARKS[len(begun) :]]
    assert found.number.tolist() == number + tail
    assert found.where.tolist() == [n >= 0 for n in number + tail]
    assert not found.single_digits and len(found.sign) == 0 and found.digits == [] and found.place_values == []


def test_one_merged_token_disables_digit_tokens() -> None:
    """All digits are single tokens, except in the last number: `81]`, then `8` and `1]`, then ` 8`."""
    for pieces in (["81]"], ["8", "1]"]):
        found = find_answer_tokens("grounding", PLAIN, offsets_of([*PLAIN[:45], *pieces, "}"]))
        assert found.number[45:].tolist() == [9] * len(pieces) + [-1] and not found.single_digits
    found = find_answer_tokens("grounding", PLAIN, offsets_of([*PLAIN[:44], " 8", *PLAIN[46:]]))
    assert found.number[44:].tolist() == [9, 9, -1, -1] and not found.single_digits


def test_a_space_outside_all_offsets_belongs_to_the_next_token() -> None:
    offsets = offsets_of(list(PLAIN))
    trimmed = [*offsets[:5], *offsets[6:]]  # the space before 7 is in no token's offsets: the token is " 7"
    found = find_answer_tokens("grounding", PLAIN, trimmed)
    assert found.number[5] == 0 and found.where.sum() == 12 and not found.single_digits


@pytest.mark.parametrize("answer", ["", '{"frame": 1}', ANSWER.replace("3.0, ", ""), ANSWER + " 7"])
def test_answers_without_ten_numbers_raise(tokenizer: Any, answer: str) -> None:
    with pytest.raises(ValueError, match="camera has 10 numbers"):
        find_answer_tokens("grounding", answer, encode(tokenizer, answer)[1])


def test_corners_of_a_world_box(tokenizer: Any) -> None:
    answer = "-1.25,0.3,-0.0,12.5,3.07,1.0"
    tokens, offsets = encode(tokenizer, answer)
    found = find_answer_tokens("grounding", answer, offsets, "world")
    assert found.single_digits and len(found.sign) == len(found.digits) == len(found.place_values) == 6
    assert ["".join(tokens[i] for i in indices) for indices in found.digits] == answer.replace("-", "").split(",")
    assert found.place_values[3] == pytest.approx([10, 1, 0, 0.1])
    assert ["-" if tokens[i].endswith("-") else "+" for i in found.sign] == list("-+-+++")
    chosen = [token for token, flag in zip(tokens, found.where, strict=True) if flag]
    assert "".join(chosen) == "".join(c for c in answer if c.isdigit())


@pytest.mark.parametrize(
    ("answer", "sign"), [("1,2,-3,4,5,6", [0, 1, 4, 6, 8, 10]), ("-1,2,3,4,5,6", [0, 2, 4, 6, 8, 10])]
)
def test_the_sign_of_a_number_at_the_beginning(answer: str, sign: list[int]) -> None:
    """It is predicted at the first token, which is the number's minus, or its first digit without one."""
    found = find_answer_tokens("grounding", answer, offsets_of(list(answer)), "world")
    assert found.sign.tolist() == sign and found.digits[0] == [answer.index("1")]


@pytest.mark.parametrize("answer", ["", "1,2,3,4,5", "1,2,3,4,5,6,7", ANSWER])
def test_world_answers_without_six_numbers_raise(tokenizer: Any, answer: str) -> None:
    with pytest.raises(ValueError, match="world has 6 numbers"):
        find_answer_tokens("grounding", answer, encode(tokenizer, answer)[1], "world")


def test_unknown_box_format() -> None:
    with pytest.raises(ValueError, match="box_format is 'corners'; it is one of camera, world"):
        find_answer_tokens("grounding", "", [], "corners")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["caption", "answer"])
def test_where_tokens_of_a_text_are_all_but_the_end_of_turn(kind: Any) -> None:
    pieces = ["2", " chairs", ", ", "1.5 m", "<|im_end|>"]
    found = find_answer_tokens(kind, "2 chairs, 1.5 m", offsets_of(pieces))
    assert found.where.tolist() == [True] * 4 + [False]
    assert found.number.tolist() == [-1] * 5  # its digits are no box
    assert not found.single_digits and len(found.sign) == 0 and found.digits == [] and found.place_values == []
    empty = find_answer_tokens(kind, "", [(0, 10)])
    assert empty.where.tolist() == [False]


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind is 'box'; it is one of grounding, caption, answer"):
        find_answer_tokens("box", "", [])  # type: ignore[arg-type]


def test_what_tokens_overlap_the_description() -> None:
    pieces = ["Text", ":", " The", " red", " chair", ".\n", "Output"]  # the description is characters 6 to 20
    assert what_tokens((6, 20), offsets_of(pieces)).tolist() == [False, False, True, True, True, True, False]
    assert what_tokens((6, 19), offsets_of(pieces)).tolist() == [False, False, True, True, True, False, False]
    assert what_tokens((5, 6), offsets_of(pieces)).tolist() == [False, False, True, False, False, False, False]
    for nothing in (0, 6, 7, 27):
        assert not what_tokens((nothing, nothing), offsets_of(pieces)).any()
    assert what_tokens((0, 3), []).tolist() == []


def test_what_tokens_with_trimmed_spaces_and_bytes() -> None:
    # "a é b": spaces belong to the tokens after them, the two bytes of é share its character, (5, 5) is a lone prefix
    offsets = [(0, 1), (2, 3), (2, 3), (4, 5), (5, 5)]
    assert what_tokens((2, 3), offsets).tolist() == [False, True, True, False, False]
    assert what_tokens((1, 2), offsets).tolist() == [False, True, False, False, False]
    assert what_tokens((3, 4), offsets).tolist() == [False, False, False, True, False]
    assert what_tokens((0, 9), offsets).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("description", "written"),
    [
        ("the Red chair.", "The red chair."),
        ("  a door. ", "a door."),  # spaces around it are dropped
        ("straße {0} {description}", "Straße {0} {description}"),
        ("ßa", "Ssa"),  # capitalised, it is longer
    ],
)
def test_the_description_in_scanrefers_question(description: str, written: str) -> None:
    question = question_text(description)
    begin, end = description_span(description)
    assert question[begin:end] == written
    assert question[:begin].rstrip(" ").endswith("\nText:") and question[end:].lstrip(" ").startswith("\nOutput a JSON")


def test_token_tables(tokenizer: Any) -> None:
    tables = token_tables(tokenizer, 1000)
    for digit in range(10):
        assert tables.digit[tokenizer.convert_tokens_to_ids(str(digit))] == digit
    assert (tables.digit >= 0).sum() == 10
    assert tables.minus[tokenizer.convert_tokens_to_ids("-")]
    assert not tables.minus[len(tokenizer) :].any() and not tables.minus[tokenizer.convert_tokens_to_ids("[")]


class Words:
    """Tokenizer with a given vocabulary: spelling -> decoded text."""

    def __init__(self, **texts: str) -> None:
        self.texts = list(texts.values())
        self.spellings = list(texts)

    def get_vocab(self) -> dict[str, int]:
        return {spelling: index for index, spelling in enumerate(self.spellings)}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.spellings[index]

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        """Encode every character as the token with that text, or else as the first token."""
        known = {word: index for index, word in enumerate(self.texts)}
        ids = [known.get(character, 0) for character in text]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def test_tables_use_the_decoded_text_of_a_token() -> None:
    texts = {"1": "1", "▁1": "1", "Ġ2": " 2", "<0x33>": "3", "12": "12", "²": "²", "４": "４", "5.": "5.", "1a": "1a"}
    signs = {"-": "-", "▁-": "-", "[-": " [-", "<0x2D>": "-", "--": "--", "-[": "-[", "a": "a"}
    tables = token_tables(Words(**texts, **signs), 17)
    assert tables.digit.tolist() == [1, 1, 2, 3] + [-1] * 13
    assert tables.minus.tolist() == [False] * 9 + [True] * 5 + [False] * 3
    fewer = token_tables(Words(**texts), 2)  # a model whose vocabulary is smaller than the tokenizer's
    assert fewer.digit.tolist() == [1, 1] and fewer.minus.tolist() == [False, False]


def test_a_tokenizer_without_digits_has_tables_without_digits() -> None:
    tables = token_tables(Words(**{"12": "12", "²": "²", "-": "-"}), 4)
    assert tables.digit.tolist() == [-1] * 4 and tables.minus.tolist() == [False, False, True, False]


def test_require_digit_tokens_accepts_single_digits(tokenizer: Any) -> None:
    require_digit_tokens(tokenizer, "objective.push_term soft_iou")


def test_a_digit_without_a_token_raises() -> None:
    ten = {str(digit): str(digit) for digit in range(10)}
    require_digit_tokens(Words(unk="?", **ten), "objective.push_term soft_iou")
    del ten["7"]
    with pytest.raises(
        ValueError, match=r"objective.push_term soft_iou needs .* Words makes '7' in '.*' the one token 'unk'"
    ):
        require_digit_tokens(Words(unk="?", **ten), "objective.push_term soft_iou")


@pytest.mark.parametrize("merged", ["77", "9.9", " 3", "-1", "1]", "8,", "-0.", ",1", "2,-3"])
def test_a_merged_digit_token_raises(merged: str) -> None:
    tokenizer = train_tokenizer([ANSWER] * 3)
    tokenizer.add_tokens([merged])
    with pytest.raises(ValueError, match=r"objective.push_term unblocked needs .*Qwen2Tokenizer makes"):
        require_digit_tokens(tokenizer, "objective.push_term unblocked")
