"""Reading numbers off teacher-forced predictions, and the similarity of what was read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from w2r2_ds.data.boxes import camera_to_world
from w2r2_ds.data.iou import box_iou
from w2r2_ds.objective.similarity import grounding_similarity, read_numbers

FRAME, X = 0, 1
VALUES = "[-0.63, 12.4, 3.02, 3.0, 0.59, 2.35, -2.32, 1.18, 0.05]"


@pytest.fixture
def batch(batch_of: Any, samples: list[Any]) -> Any:
    """The second answer is one digit longer in several places, so that the first one is padded."""
    first = replace(samples[0], answer=f'{{"frame": 2, "bbox_3d": {VALUES}}}')
    second = replace(samples[2], answer=f'{{"frame": 12, "bbox_3d": {VALUES.replace("3.0,", "103.25,")}}}')
    return batch_of([first, second])


@pytest.fixture
def change(front: Any, batch: Any) -> Any:
    """`change(sample, number, position, token)`: predictions equal to the labels but for one token of a number."""

    def predict(sample: int, number: int, position: int, token: str) -> torch.Tensor:
        predicted = batch.answer_rows.label.clone()
        row = batch.answer_rows.number[sample, number]
        after = int(row[row >= 0][-1]) + 1
        index = front.tokenizer.convert_tokens_to_ids(token)
        assert index is not None
        predicted[int(row[position]) if position < int((row >= 0).sum()) else after] = index
        return predicted

    return predict


def test_all_right(batch: Any, tables: Any) -> None:
    numbers = read_numbers(batch.answer_rows.label, batch.answer_rows, tables)
    assert numbers.dtype == torch.float64
    expected = [2, -0.63, 12.4, 3.02, 3.0, 0.59, 2.35, -2.32, 1.18, 0.05]
    assert numbers[0].tolist() == pytest.approx(expected)
    assert numbers[1].tolist() == pytest.approx([12, *expected[1:4], 103.25, *expected[5:]])


@pytest.mark.parametrize(
    ("sample", "number", "position", "token", "value"),
    [
        # The first wrong digit ends the number, half a unit is added: 3.02 with 2 first reads as 2.5, not 2.02.
        (0, 3, 0, "2", 2.5),
        (0, 3, 2, "9", 3.95),
        (0, 3, 3, "8", 3.085),
        (0, 1, 2, "1", -0.15),
        (0, 2, 0, "2", 25.0),
        (0, 2, 1, "3", 13.5),
        (1, 4, 1, "7", 175.0),
        # It ends early: read as far as it goes.
        (0, 3, 1, ",", 3.0),
        (0, 3, 3, ",", 3.0),
        (0, 2, 1, ",", 1.0),
        (0, 2, 1, ".", 1.0),
        (1, 4, 1, ",", 1.0),
        (1, 4, 2, ",", 10.0),
        (0, 3, 0, ",", 0.0),
        # It goes on where the label does not.
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
    numbers = read_numbers(predicted, batch.answer_rows, tables)
    assert float(numbers[sample, number]) == pytest.approx(value)
    numbers[sample, number] = read_numbers(batch.answer_rows.label, batch.answer_rows, tables)[sample, number]
    assert torch.equal(numbers, read_numbers(batch.answer_rows.label, batch.answer_rows, tables))


def test_later_digits_do_not_count_after_a_wrong_one(batch: Any, tables: Any, change: Any, front: Any) -> None:
    """2.98 for 3.02: of the tokens 2 . 9 8 only the first is believed, the others were conditioned on the 3."""
    rows = batch.answer_rows
    predicted = change(0, 3, 0, "2")
    for position, token in ((2, "9"), (3, "8")):
        predicted[rows.number[0, 3, position]] = front.tokenizer.convert_tokens_to_ids(token)
    assert float(read_numbers(predicted, rows, tables)[0, 3]) == 2.5


def test_wrong_signs(batch: Any, tables: Any, front: Any) -> None:
    rows = batch.answer_rows
    minus, space = front.tokenizer.convert_tokens_to_ids("-"), front.tokenizer.convert_tokens_to_ids("Ġ")
    predicted = rows.label.clone()
    predicted[rows.lead[0, X]], predicted[rows.lead[0, 7]], predicted[rows.lead[0, 2]] = space, space, minus
    numbers = read_numbers(predicted, rows, tables)
    assert numbers[0, [X, 7, 2]].tolist() == pytest.approx([0.63, 2.32, -12.4])


def test_any_end_of_a_number_is_right(batch: Any, tables: Any, front: Any) -> None:
    """What follows a number is not its own: another comma or bracket does not change it."""
    rows = batch.answer_rows
    labels = read_numbers(rows.label, rows, tables)
    for token in ("]", "}", "<|im_end|>", "."):
        predicted = rows.label.clone()
        predicted[rows.number.amax(-1).flatten() + 1] = front.tokenizer.convert_tokens_to_ids(token)
        signs = read_numbers(predicted, rows, tables).abs() == labels.abs()
        assert signs.all()


def test_correct_predictions_have_similarity_one_up_to_rounding(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    similarity = grounding_similarity(batch.answer_rows.label, batch, tables)
    assert similarity.dtype == torch.float64 and (similarity > 0.95).all() and (similarity <= 1).all()


def test_similarity_is_that_of_the_box_that_was_read(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    rows = batch.answer_rows
    predicted = rows.label.clone()
    digit = int((tables.digit == 0).nonzero()[0, 0])
    predicted[rows.number[:, 4, 0]] = digit  # the first size, 1.2, reads as 0.5
    numbers = read_numbers(predicted, rows, tables).numpy()
    assert (numbers[:, 4] == 0.5).all()
    similarity = grounding_similarity(predicted, batch, tables)
    for index, sample in enumerate(samples):
        world = camera_to_world(numbers[index, 1:], sample.cam_to_world[int(numbers[index, 0])])
        expected = box_iou(torch.from_numpy(world)[None], torch.from_numpy(sample.target.box)[None])
        assert float(similarity[index]) == pytest.approx(float(expected[0]))
    assert similarity.numpy() == pytest.approx(np.full(3, 0.5 / 1.2), abs=0.03)


def test_invalid_answers_have_similarity_zero(batch_of: Any, samples: list[Any], tables: Any, front: Any) -> None:
    """A frame that only a longer sample has, one that none has, a size of zero, a negative size."""
    batch = batch_of([samples[1], samples[2]])
    rows = batch.answer_rows
    token = front.tokenizer.convert_tokens_to_ids
    cases = []
    for row, text in (
        (rows.number[0, FRAME, 0], "7"),
        (rows.number[1, FRAME, 0], "9"),
        (rows.number[0, 5, 0], ","),
        (rows.lead[0, 5], "-"),
    ):
        predicted = rows.label.clone()
        predicted[row] = token(text)
        cases.append(predicted)
    similarity = torch.stack([grounding_similarity(predicted, batch, tables) for predicted in cases])
    assert similarity[:, 0].tolist() == [0, pytest.approx(1, abs=0.05), 0, 0]
    assert similarity[1, 1] == 0 and similarity.isfinite().all()


def test_noise_is_never_nan(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        predicted = torch.randint(len(tables.digit), batch.answer_rows.label.shape, generator=generator)
        similarity = grounding_similarity(predicted, batch, tables)
        assert similarity.isfinite().all() and (similarity >= 0).all() and (similarity <= 1).all()
