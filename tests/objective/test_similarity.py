"""Numbers and texts of teacher-forced predictions, and IoU of teacher-forced and decoded boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from host_sync import host_reads
from w2r2_ds.boxes3d.iou import box_iou
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.objective.similarity import (
    decoded_grounding_similarity,
    grounding_similarity,
    has_numbers,
    has_text,
    predicted_numbers,
    predicted_texts,
)

FRAME, X = 0, 1
VALUES = "[-0.63, 12.4, 3.02, 3.0, 0.59, 2.35, -2.32, 1.18, 0.05]"


@pytest.fixture
def batch(batch_of: Any, samples: list[Any]) -> Any:
    """Two answers. The second has one digit more in several places, so the first one's digit tokens are padded."""
    first = replace(samples[0], answer=f'{{"frame": 2, "bbox_3d": {VALUES}}}')
    second = replace(samples[2], answer=f'{{"frame": 12, "bbox_3d": {VALUES.replace("3.0,", "103.25,")}}}')
    return batch_of([first, second])


@pytest.fixture
def change(frontend: Any, batch: Any) -> Any:
    """Function `change(sample, number, position, token)`: the labels with one token of a number replaced."""

    def predict(sample: int, number: int, position: int, token: str) -> torch.Tensor:
        predicted = batch.answer_positions.label.clone()
        row = batch.answer_positions.digit[sample, number]
        after = int(row[row >= 0][-1]) + 1
        index = frontend.tokenizer.convert_tokens_to_ids(token)
        assert index is not None
        predicted[int(row[position]) if position < int((row >= 0).sum()) else after] = index
        return predicted

    return predict


def test_correct_predictions_give_the_labels_numbers(batch: Any, tables: Any) -> None:
    numbers = predicted_numbers(batch.answer_positions.label, batch.answer_positions, tables)
    assert numbers.dtype == torch.float64
    expected = [2, -0.63, 12.4, 3.02, 3.0, 0.59, 2.35, -2.32, 1.18, 0.05]
    assert numbers[0].tolist() == pytest.approx(expected)
    assert numbers[1].tolist() == pytest.approx([12, *expected[1:4], 103.25, *expected[5:]])


@pytest.mark.parametrize(
    ("sample", "number", "position", "token", "value"),
    [
        # The number is cut at the first wrong digit and half a unit is added: 3.02 with 2 first is 2.5, not 2.02.
        (0, 3, 0, "2", 2.5),
        (0, 3, 2, "9", 3.95),
        (0, 3, 3, "8", 3.085),
        (0, 1, 2, "1", -0.15),
        (0, 2, 0, "2", 25.0),
        (0, 2, 1, "3", 13.5),
        (1, 4, 1, "7", 175.0),
        # The number ends early.
        (0, 3, 1, ",", 3.0),
        (0, 3, 3, ",", 3.0),
        (0, 2, 1, ",", 1.0),
        (0, 2, 1, ".", 1.0),
        (1, 4, 1, ",", 1.0),
        (1, 4, 2, ",", 10.0),
        (0, 3, 0, ",", 0.0),
        # The number continues after the label's end.
        (0, 3, 1, "7", 37.5),
        (0, 1, 1, "4", -4.5),
        (0, 3, 4, "6", 3.0265),
        (0, 9, 4, "5", 0.0555),
        # Frames stay integers.
        (0, FRAME, 0, "7", 7),
        (1, FRAME, 0, "2", 20),
        (1, FRAME, 1, "5", 15),
        (1, FRAME, 1, ",", 1),
        (0, FRAME, 1, "3", 23),
        (0, FRAME, 0, ",", 0),
    ],
)
def test_one_wrong_token(
    batch: Any, tables: Any, change: Any, sample: int, number: int, position: int, token: str, value: float
) -> None:
    predicted = change(sample, number, position, token)
    numbers = predicted_numbers(predicted, batch.answer_positions, tables)
    assert float(numbers[sample, number]) == pytest.approx(value)
    numbers[sample, number] = predicted_numbers(batch.answer_positions.label, batch.answer_positions, tables)[
        sample, number
    ]
    assert torch.equal(numbers, predicted_numbers(batch.answer_positions.label, batch.answer_positions, tables))


def test_later_digits_do_not_count_after_a_wrong_one(batch: Any, tables: Any, change: Any, frontend: Any) -> None:
    """2.98 for 3.02: of the tokens 2 . 9 8 only the first counts, the others were conditioned on the 3."""
    rows = batch.answer_positions
    predicted = change(0, 3, 0, "2")
    for position, token in ((2, "9"), (3, "8")):
        predicted[rows.digit[0, 3, position]] = frontend.tokenizer.convert_tokens_to_ids(token)
    assert float(predicted_numbers(predicted, rows, tables)[0, 3]) == 2.5


def test_wrong_signs(batch: Any, tables: Any, frontend: Any) -> None:
    rows = batch.answer_positions
    minus, space = frontend.tokenizer.convert_tokens_to_ids("-"), frontend.tokenizer.convert_tokens_to_ids("Ġ")
    predicted = rows.label.clone()
    predicted[rows.sign[0, X]], predicted[rows.sign[0, 7]], predicted[rows.sign[0, 2]] = space, space, minus
    numbers = predicted_numbers(predicted, rows, tables)
    assert numbers[0, [X, 7, 2]].tolist() == pytest.approx([0.63, 2.32, -12.4])


def test_tokens_after_a_number_do_not_change_it(batch: Any, tables: Any, frontend: Any) -> None:
    """The token after a number is not part of it: another comma or bracket does not change the number."""
    rows = batch.answer_positions
    labels = predicted_numbers(rows.label, rows, tables)
    for token in ("]", "}", "<|im_end|>", "."):
        predicted = rows.label.clone()
        predicted[rows.digit.amax(-1).flatten() + 1] = frontend.tokenizer.convert_tokens_to_ids(token)
        signs = predicted_numbers(predicted, rows, tables).abs() == labels.abs()
        assert signs.all()


def test_correct_predictions_have_similarity_one_up_to_rounding(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    s, valid = grounding_similarity(batch.answer_positions.label, batch, tables)
    assert s.dtype == torch.float64 and (s > 0.95).all() and (s <= 1).all()
    assert valid.tolist() == [True] * 3


def test_similarity_is_the_iou_of_the_predicted_box(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    rows = batch.answer_positions
    predicted = rows.label.clone()
    digit = int((tables.digit == 0).nonzero()[0, 0])
    predicted[rows.digit[:, 4, 0]] = digit  # the first size becomes 0.5 instead of 1.2
    numbers = predicted_numbers(predicted, rows, tables).numpy()
    assert (numbers[:, 4] == 0.5).all()
    s, _ = grounding_similarity(predicted, batch, tables)
    for index, sample in enumerate(samples):
        world = camera_to_world(numbers[index, 1:], sample.cam_to_world[int(numbers[index, 0])])
        assert float(s[index]) == pytest.approx(iou_with_target(world, sample))
    assert s.numpy() == pytest.approx(np.full(3, 0.5 / 1.2), abs=0.03)


def iou_with_target(world: np.ndarray, sample: Any) -> float:
    return float(box_iou(torch.from_numpy(world)[None], torch.from_numpy(sample.target.box)[None]))


def test_invalid_answers_have_similarity_zero(batch_of: Any, samples: list[Any], tables: Any, frontend: Any) -> None:
    """A frame index that only another sample has, or none; a size of zero; a negative size."""
    batch = batch_of([samples[1], samples[2]])
    rows = batch.answer_positions
    token = frontend.tokenizer.convert_tokens_to_ids
    cases = []
    for row, text in (
        (rows.digit[0, FRAME, 0], "7"),
        (rows.digit[1, FRAME, 0], "9"),
        (rows.digit[0, 5, 0], ","),
        (rows.sign[0, 5], "-"),
    ):
        predicted = rows.label.clone()
        predicted[row] = token(text)
        cases.append(predicted)
    s, valid = zip(*(grounding_similarity(predicted, batch, tables) for predicted in cases), strict=True)
    assert torch.stack(s)[:, 0].tolist() == [0, pytest.approx(1, abs=0.05), 0, 0]
    assert s[1][1] == 0 and torch.stack(s).isfinite().all()
    assert torch.stack(valid).tolist() == [[False, True], [True, False], [False, True], [False, True]]


def test_noise_is_never_nan(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        predicted = torch.randint(len(tables.digit), batch.answer_positions.label.shape, generator=generator)
        s, valid = grounding_similarity(predicted, batch, tables)
        assert s.isfinite().all() and (s >= 0).all() and (s <= 1).all()
        assert not s[~valid].any()


@pytest.fixture
def mixed(batch_of: Any, samples: list[Any]) -> Any:
    """A caption (with digits, and answer token 0), a box, a short answer without frames."""
    caption = replace(samples[0], answer="7 red chairs.", kind="caption", target=None, what=(0, 0))
    nowhere = {"frames": (), "cam_to_world": np.zeros((0, 4, 4)), "what": (0, 0)}
    answer = replace(samples[1], answer="brown", kind="answer", target=None, **nowhere)
    return batch_of([caption, samples[1], answer])


def test_samples_without_numbers_do_not_change_others(
    mixed: Any, batch_of: Any, samples: list[Any], tables: Any, frontend: Any
) -> None:
    """Padding refers to answer token 0, which is in the caption: a prediction there is no number."""
    rows = mixed.answer_positions
    assert has_numbers(rows).tolist() == [False, True, False]
    labels, _ = grounding_similarity(rows.label, mixed, tables)
    alone, _ = grounding_similarity(batch_of([samples[1]]).answer_positions.label, batch_of([samples[1]]), tables)
    assert labels[1] == alone[0] > 0.95
    for text in ("9", "-", ".", ","):
        predicted = rows.label.clone()
        predicted[rows.sample != 1] = frontend.tokenizer.convert_tokens_to_ids(text)
        numbers = predicted_numbers(predicted, rows, tables)
        assert not numbers[[0, 2]].any() and numbers[1].any()
        s, valid = grounding_similarity(predicted, mixed, tables)
        assert s.tolist() == [0, float(labels[1]), 0]
        assert valid.tolist() == [False, True, False]


def test_empty_digit_tokens(mixed: Any, tables: Any) -> None:
    rows = mixed.answer_positions
    empty = replace(
        rows, digit=rows.digit[..., :0], place_value=rows.place_value[..., :0], sign=torch.zeros_like(rows.sign)
    )
    assert not predicted_numbers(rows.label, empty, tables).any()
    s, valid = grounding_similarity(rows.label, replace(mixed, optional_answer_positions=empty), tables)
    assert not s.any() and not valid.any()


def test_decoded_answers_are_parsed_strictly(batch_of: Any, samples: list[Any]) -> None:
    batch = batch_of(samples)
    assert batch.cam_to_world[1, 3].isnan().all()  # the second sample has three frames, the last one twelve
    right = [sample.answer for sample in samples]
    s, valid = decoded_grounding_similarity(right, batch)
    assert valid.all() and (s > 0.95).all() and s.dtype == torch.float64 and s.device.type == "cpu"
    for index, sample in enumerate(samples):
        body = json.loads(sample.answer.removeprefix("```json").removesuffix("```"))
        world = camera_to_world(np.array(body["bbox_3d"]), sample.cam_to_world[body["frame"]])
        assert float(s[index]) == pytest.approx(iou_with_target(world, sample), abs=1e-9)

    cases = {
        "the sofa": False,
        "": False,
        right[1] + right[1]: False,
        right[1].replace('"frame": 0', '"frame": 3'): False,
        right[1].replace('"frame": 0', '"frame": 2'): True,
        right[1].replace("1.2,", "-1.2,"): False,
        right[1].replace("1.2,", "0.0,"): False,
        right[1].replace("1.2,", "1e308,"): True,
    }
    assert len(cases) == 8  # every replacement changed something
    for text, readable in cases.items():
        other, valid = decoded_grounding_similarity([right[0], text, right[2]], batch)
        assert valid.tolist() == [True, readable, True], text
        assert other[0] == s[0] and other[2] == s[2]
        assert 0 <= other[1] < s[1]


def test_only_grounding_answers_are_parsed(mixed: Any, samples: list[Any]) -> None:
    s, valid = decoded_grounding_similarity([samples[1].answer] * 3, mixed)
    assert valid.tolist() == [False, True, False]
    assert s[1] > 0.95 and not s[[0, 2]].any()


def test_teacher_forced_and_decoded_agree_on_right_answers(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    teacher, _ = grounding_similarity(batch.answer_positions.label, batch, tables)
    decoded, _ = decoded_grounding_similarity([sample.answer for sample in samples], batch)
    torch.testing.assert_close(teacher, decoded, atol=1e-12, rtol=0)


def test_texts_of_teacher_forced_predictions(mixed: Any, frontend: Any) -> None:
    def decode(tokens: list[int]) -> str:
        return frontend.tokenizer.decode(tokens, skip_special_tokens=True)

    rows = mixed.answer_positions
    assert has_text(mixed)
    assert predicted_texts(rows.label, mixed, decode) == ["7 red chairs.", "", "brown"]
    wrong = rows.label.clone()
    wrong[0] = frontend.tokenizer.convert_tokens_to_ids("2")
    wrong[(rows.sample == 2).nonzero()[0]] = frontend.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert predicted_texts(wrong, mixed, decode) == ["2 red chairs.", "", ""]
    longer = rows.label.clone()
    longer[(rows.sample == 2).nonzero()[-1]] = frontend.tokenizer.convert_tokens_to_ids(".")
    assert predicted_texts(longer, mixed, decode)[2] == "brown."
    # Another end token of greedy decoding ends a teacher-forced text too.
    end_of_text = frontend.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    longer[1] = end_of_text
    first = [int(label) for label in rows.label[rows.sample == 0]]
    assert predicted_texts(longer, mixed, decode, [end_of_text])[0] == decode(first[:1])
    assert predicted_texts(longer, mixed, decode)[0] == decode([first[0], *first[2:]])


def test_grounding_does_not_synchronize(batch_of: Any, samples: list[Any], tables: Any) -> None:
    """No host read on the CPU, and the meta device, which has no values, works."""
    batch = batch_of(samples)
    assert not has_text(batch)
    assert predicted_texts(batch.answer_positions.label, batch, must_not_decode) == ["", "", ""]
    assert not host_reads(lambda: grounding_similarity(batch.answer_positions.label, batch, tables))
    meta = batch.to(torch.device("meta"))
    s, valid = grounding_similarity(meta.answer_positions.label, meta, tables.to(torch.device("meta")))
    assert s.shape == valid.shape == (3,)
    assert predicted_texts(meta.answer_positions.label, meta, must_not_decode) == ["", "", ""]


def must_not_decode(tokens: list[int]) -> str:
    raise AssertionError(tokens)
