"""Answers in box format `world`, alone and in one batch with camera boxes: numbers, similarity s, expected box."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from host_sync import host_reads
from w2r2_ds.boxes3d.aabb import aabb_iou
from w2r2_ds.boxes3d.giou import box_giou
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.parsing import AnswerError, WorldGrounding
from w2r2_ds.data.tasks.scanrefer import ScanRefer
from w2r2_ds.objective.expected_box import expected_numbers, expected_overlap
from w2r2_ds.objective.similarity import decoded_grounding_similarity, grounding_similarity, predicted_numbers
from world_answers import BOXES, POSITIVE, in_world

SIX = slice(0, 6)


@pytest.fixture
def worlds(samples: list[Any]) -> list[Any]:
    """Three samples with a world box; the first number of the first answer is negative."""
    return [in_world(sample, box) for sample, box in zip(samples, BOXES, strict=True)]


@pytest.fixture
def mixed(batch_of: Any, samples: list[Any], worlds: list[Any], caption_sample: Any) -> Any:
    """World, camera, caption, world."""
    return batch_of([worlds[0], samples[1], caption_sample, worlds[2]])


@pytest.fixture
def token(frontend: Any) -> Callable[[str], int]:
    return frontend.tokenizer.convert_tokens_to_ids


def numbers_of(sample: Any) -> list[float]:
    return [float(part) for part in sample.answer.split(",")]


def sure(labels: Tensor, vocabulary: int) -> Tensor:
    """``[answer tokens, vocabulary]`` float64 log-probabilities: 1 for the label."""
    return torch.full((len(labels), vocabulary), -math.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)


def noise(batch: Any, tables: Any, trust: float = 6.0) -> Tensor:
    """``[answer tokens, vocabulary]`` float64 random logits, raised by `trust` at the label."""
    labels = batch.answer_positions.label
    logits = torch.randn(
        len(labels), len(tables.digit), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return logits.scatter_add(1, labels[:, None], torch.full_like(logits[:, :1], trust))


def test_labels_and_their_positions(frontend: Any, mixed: Any, worlds: list[Any]) -> None:
    rows, tokens = mixed.answer_positions, frontend.tokenizer.convert_ids_to_tokens
    assert mixed.box_formats == ("world", "camera", "camera", "world")
    assert rows.in_world.tolist() == [True, False, False, True]
    assert rows.digit.shape[:2] == rows.place_value.shape[:2] == rows.sign.shape == (4, 10)
    for index, sample in ((0, worlds[0]), (3, worlds[2])):
        mine = (rows.sample == index).nonzero().squeeze(-1)
        assert frontend.tokenizer.decode(rows.label[mine]) == sample.answer + "<|im_end|>"
        # The last token of the prompt predicts the first token of the answer, with which its first number begins.
        before = mixed.input_ids[index, int(rows.position[mine[0]])]
        assert frontend.tokenizer.decode(before) == "\n" and rows.sign[index, 0] == mine[0]
        for number, text in enumerate(sample.answer.split(",")):
            at = rows.digit[index, number]
            assert "".join(tokens(rows.label[at[at >= 0]].tolist())) == text.removeprefix("-")
            assert tokens(int(rows.label[rows.sign[index, number]])).endswith("-") == text.startswith("-")
        assert (rows.digit[index, 6:] == -1).all() and not rows.place_value[index, 6:].any()
        assert int(rows.where[mine].sum()) == sum(character.isdigit() for character in sample.answer)
    assert worlds[0].answer.startswith("-") and not worlds[2].answer.startswith("-")


def test_numbers_of_a_mixed_batch(
    mixed: Any, worlds: list[Any], samples: list[Any], batch_of: Any, tables: Any
) -> None:
    rows = mixed.answer_positions
    numbers = predicted_numbers(rows.label, rows, tables)
    expected = expected_numbers(sure(rows.label, len(tables.digit)), rows, tables)
    torch.testing.assert_close(numbers, expected, atol=1e-12, rtol=0)
    for index, sample in ((0, worlds[0]), (3, worlds[2])):
        assert numbers[index, SIX].tolist() == pytest.approx(numbers_of(sample), abs=1e-12)
        assert not numbers[index, 6:].any()
    camera = batch_of([samples[1]])
    alone = predicted_numbers(camera.answer_positions.label, camera.answer_positions, tables)
    assert torch.equal(numbers[1], alone[0]) and not numbers[2].any()


def test_answers_of_one_and_of_two_decimals_in_one_batch(batch_of: Any, samples: list[Any], tables: Any) -> None:
    """The token layout is that of each label: the numbers are the label's, and a wrong last digit is 0.1 off."""
    box = POSITIVE + np.repeat([0.022, 0.0], [6, 3])
    worlds = [in_world(sample, box, decimals=each) for sample, each in zip(samples, (1, 2), strict=False)]
    assert [world.answer for world in worlds] == ["2.3,3.1,1.2,3.9,5.3,2.6", "2.31,3.11,1.21,3.93,5.33,2.63"]
    batch = batch_of(worlds)
    rows = batch.answer_positions
    expected = expected_numbers(sure(rows.label, len(tables.digit)), rows, tables)
    for index, world in enumerate(worlds):
        assert expected[index, SIX].tolist() == pytest.approx(numbers_of(world), abs=1e-12)
        parsed = TASKS["scanrefer"].parse(world.answer, 0, "world").box
        overlap = expected_overlap(sure(rows.label, len(tables.digit)), batch, tables)[0][index]
        assert float(overlap) == pytest.approx(aabb_iou(parsed, world.target.box[:6]), abs=1e-6)
    predicted = rows.label.clone()
    last = int(rows.digit[0, 0, 2])
    predicted[last] = rows.label[rows.digit[0, 0, 0]]  # 2.2 for the label 2.3, with half a unit
    assert float(predicted_numbers(predicted, rows, tables)[0, 0]) == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("number", "position", "text", "value"),
    [
        (0, 0, "2", 25.0),  # 10.6: a coordinate gets half a unit, unlike the frame index of a camera answer
        (0, 1, "9", 19.5),
        (0, 3, "8", 10.85),
        (0, 0, "-", 0.0),  # a minus instead of the first digit: the digits are unknown
        (5, 2, "4", 0.45),
        (5, 3, "<|im_end|>", 0.1),
    ],
)
def test_one_wrong_token(
    batch_of: Any, worlds: list[Any], tables: Any, token: Any, number: int, position: int, text: str, value: float
) -> None:
    batch = batch_of([worlds[2]])
    rows = batch.answer_positions
    assert worlds[2].answer == "10.6,3.8,-0.5,12.0,5.7,0.1"
    predicted = rows.label.clone()
    row = rows.digit[0, number]
    length = int((row >= 0).sum())
    predicted[int(row[position]) if position < length else int(row[length - 1]) + 1] = token(text)
    expected = predicted_numbers(rows.label, rows, tables)[0]
    expected[number] = value
    torch.testing.assert_close(predicted_numbers(predicted, rows, tables)[0], expected, atol=1e-12, rtol=0)


def test_wrong_sign_of_the_first_number(batch_of: Any, worlds: list[Any], tables: Any, token: Any) -> None:
    """Of a negative number, the minus is a token of its own: with another token there, the number is positive."""
    batch = batch_of([worlds[0]])
    rows = batch.answer_positions
    predicted = rows.label.clone()
    predicted[rows.sign[0, 0]] = token("3")
    first = numbers_of(worlds[0])[0]
    assert first == -1.75
    assert predicted_numbers(predicted, rows, tables)[0, :2].tolist() == pytest.approx([1.75, numbers_of(worlds[0])[1]])


def corrupted(sample: Any, rows: Any, index: int, token: Any, draw: np.random.Generator) -> tuple[Tensor, str]:
    """Predictions with wrong digits and signs in some numbers of a world answer, and the text that they stand for.

    A number that is cut at its first wrong digit is written with this digit and a 5 at the next place, which is half a
    unit of the digit's place.
    """
    predicted, words = rows.label.clone(), []
    for number, text in enumerate(sample.answer.split(",")):
        magnitude, minus = text.removeprefix("-"), text.startswith("-")
        tokens = rows.digit[index, number].tolist()
        if draw.random() < 0.3:
            position = int(draw.choice([i for i, character in enumerate(magnitude) if character != "."]))
            wrong = str((int(magnitude[position]) + int(draw.integers(1, 10))) % 10)
            predicted[tokens[position]] = token(wrong)
            before_point = magnitude.index(".") - position - 1  # digits between this one and the decimal point
            rest = ".5" if before_point == 0 else "5" + "0" * (before_point - 1) if before_point > 0 else "5"
            magnitude = magnitude[:position] + wrong + rest
        if draw.random() < 0.1 and (minus or number > 0):
            predicted[rows.sign[index, number]] = token("," if minus else "-")
            minus = not minus
        words.append(("-" if minus else "") + magnitude)
    return predicted, ",".join(words)


def test_teacher_forced_equals_decoded_for_random_boxes(
    batch_of: Any, samples: list[Any], tables: Any, token: Any
) -> None:
    """World boxes with positive and negative numbers of one to three digits, every second batch with a camera box."""
    draw = np.random.default_rng(0)
    overlaps, negative = [], 0
    for trial in range(60):
        scale = 10.0 ** draw.uniform(-0.5, 2, 3)
        box = np.concatenate([(draw.normal(size=3) + 0.6) * scale, scale * draw.uniform(0.2, 2, 3), np.zeros(3)])
        sample = in_world(samples[0], box)
        chosen = [samples[1], sample] if trial % 2 else [sample]
        batch = batch_of(chosen)
        predicted, text = corrupted(sample, batch.answer_positions, len(chosen) - 1, token, draw)
        texts = [samples[1].answer, text] if trial % 2 else [text]
        teacher, valid = grounding_similarity(predicted, batch, tables)
        decoded, parsed = decoded_grounding_similarity(texts, batch)
        torch.testing.assert_close(teacher, decoded, atol=1e-9, rtol=0)
        assert torch.equal(valid, parsed)
        numbers = np.array([float(part) for part in text.split(",")])
        low, high = numbers[:3], numbers[3:]
        assert bool(valid[-1]) == bool((high > low).all())
        expected = aabb_iou([*(low + high) / 2, *(high - low)], box[:6]) if (high > low).all() else 0.0
        assert float(teacher[-1]) == pytest.approx(expected, abs=1e-6)
        assert not trial % 2 or teacher[0] > 0.95
        overlaps.append(float(teacher[-1]))
        negative += sample.answer.startswith("-")
    assert 15 < negative < 45 and sum(overlap > 0.9 for overlap in overlaps) > 8
    assert sum(0.05 < overlap < 0.9 for overlap in overlaps) > 8 and sum(overlap == 0 for overlap in overlaps) > 8


@pytest.mark.parametrize("text", ["", "1,2,3,4,5", "1,2,3,1,5,6", "4,2,3,1,5,6", "camera"])
def test_texts_without_a_valid_world_box(batch_of: Any, worlds: list[Any], samples: list[Any], text: str) -> None:
    """Too few numbers, an empty and a negative side, an answer in a camera; the other sample keeps its box."""
    text = samples[0].answer if text == "camera" else text
    s, valid = decoded_grounding_similarity([text, worlds[1].answer], batch_of(worlds[:2]))
    assert s[0] == 0 and s[1] > 0.95 and valid.tolist() == [False, True]


def test_a_world_box_is_no_answer_in_a_camera(batch_of: Any, samples: list[Any], worlds: list[Any]) -> None:
    s, valid = decoded_grounding_similarity([worlds[0].answer, worlds[0].answer], batch_of([samples[0], worlds[0]]))
    assert s[0] == 0 and s[1] > 0.95 and valid.tolist() == [False, True]


@pytest.mark.parametrize("side", [0.0, -0.5])
def test_a_side_that_is_not_positive_has_no_overlap(batch_of: Any, worlds: list[Any], tables: Any, side: float) -> None:
    x = numbers_of(worlds[1])[0]
    label = ",".join([*worlds[1].answer.split(",")[:3], str(round(x + side, 2)), *worlds[1].answer.split(",")[4:]])
    batch = batch_of([replace(worlds[1], answer=label), worlds[0]])
    rows = batch.answer_positions
    s, valid = grounding_similarity(rows.label, batch, tables)
    assert s[0] == 0 and s[1] > 0.95 and valid.tolist() == [False, True]
    log_p = sure(rows.label, len(tables.digit)).requires_grad_()
    iou, giou, has_box = expected_overlap(log_p, batch, tables)
    assert has_box.all() and iou[0] == 0 and giou[0] == -1 and giou[1] > 0.9
    (gradient,) = torch.autograd.grad(giou.sum(), log_p)
    assert gradient.isfinite().all() and not gradient[rows.sample == 0].any()


def test_expected_numbers_by_hand(batch_of: Any, worlds: list[Any], tables: Any, token: Any) -> None:
    """A minus and a digit at the first token of an answer: P(minus) is of all tokens, E[digit] of digits only."""
    batch = batch_of([worlds[2]])
    rows = batch.answer_positions
    log_p = sure(rows.label, len(tables.digit))
    assert rows.sign[0, 0] == rows.digit[0, 0, 0] == 0
    log_p[0] = -math.inf
    log_p[0, [token("-"), token("1"), token("3"), token(",")]] = torch.tensor(
        [0.1, 0.6, 0.2, 0.1], dtype=torch.float64
    ).log()
    numbers = expected_numbers(log_p, rows, tables)[0]
    expected = [(1 - 2 * 0.1) * (10 * (0.6 + 0.2 * 3) / 0.8 + 0.6), *numbers_of(worlds[2])[1:]]
    assert numbers[SIX].tolist() == pytest.approx(expected, abs=1e-12) and not numbers[6:].any()


def test_overlap_is_that_of_the_expected_corners(mixed: Any, tables: Any) -> None:
    log_p = torch.log_softmax(noise(mixed, tables, trust=9.0), -1)
    iou, giou, has_box = expected_overlap(log_p, mixed, tables)
    assert has_box.tolist() == [True, True, False, True]
    numbers = expected_numbers(log_p, mixed.answer_positions, tables)
    for index in (0, 3):
        low, high = numbers[index, :3], numbers[index, 3:6]
        box = torch.cat([(low + high) / 2, high - low, torch.zeros(3)])
        expected = box_giou(box[None], mixed.target_box[[index]])
        assert float(iou[index]) == pytest.approx(float(expected[0]), abs=1e-12)
        assert float(giou[index]) == pytest.approx(float(expected[1]), abs=1e-12)
        assert 0.1 < iou[index] < 0.99 and giou[index] < iou[index]


def test_gradient_of_overlap_matches_finite_differences(mixed: Any, tables: Any) -> None:
    logits = noise(mixed, tables).requires_grad_()

    def overlap(values: Tensor) -> tuple[Tensor, Tensor]:
        return expected_overlap(torch.log_softmax(values, -1), mixed, tables)[:2]

    assert torch.autograd.gradcheck(overlap, (logits,), eps=1e-6, atol=1e-6, fast_mode=True)
    (gradient,) = torch.autograd.grad(overlap(logits)[1][[0, 3]].sum(), logits)
    sample = mixed.answer_positions.sample
    assert gradient[sample == 0].any() and gradient[sample == 3].any() and not gradient[sample == 1].any()


def test_a_mixed_batch_equals_its_samples_separately(
    mixed: Any, batch_of: Any, samples: list[Any], worlds: list[Any], caption_sample: Any, tables: Any
) -> None:
    """Values and gradients; those of the camera box are bit for bit the same."""
    log_p = torch.log_softmax(noise(mixed, tables), -1).requires_grad_()
    rows = mixed.answer_positions
    values = torch.stack(expected_overlap(log_p, mixed, tables)[:2])
    (gradient,) = torch.autograd.grad(values.sum(), log_p)
    s, _ = grounding_similarity(log_p.argmax(-1), mixed, tables)
    for index, sample in enumerate([worlds[0], samples[1], caption_sample, worlds[2]]):
        own, alone = log_p.detach()[rows.sample == index].requires_grad_(), batch_of([sample])
        expected = torch.cat(expected_overlap(own, alone, tables)[:2])
        assert torch.equal(values[:, index], expected)
        assert torch.equal(s[[index]], grounding_similarity(own.argmax(-1), alone, tables)[0])
        assert torch.equal(gradient[rows.sample == index], torch.autograd.grad(expected.sum(), own)[0])


@pytest.mark.slow
def test_gradient_ascent_reaches_the_box(batch_of: Any, samples: list[Any], tables: Any) -> None:
    """From digits that lean a little towards the label, ascent on GIoU leads to a large overlap."""
    batch = batch_of([in_world(samples[0], POSITIVE)])
    logits = noise(batch, tables, trust=3.0).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    iou, giou, _ = expected_overlap(torch.log_softmax(logits, -1), batch, tables)
    assert iou.item() < 0.2 and giou.item() > -1
    for _ in range(100):
        optimiser.zero_grad()
        (-expected_overlap(torch.log_softmax(logits, -1), batch, tables)[1]).sum().backward()
        optimiser.step()
    assert expected_overlap(torch.log_softmax(logits, -1), batch, tables)[0].item() > 0.7


def test_no_synchronization(mixed: Any, batch_of: Any, samples: list[Any], worlds: list[Any], tables: Any) -> None:
    """Forward and backward; the meta device, which has no values, works too."""
    log_p = torch.log_softmax(noise(mixed, tables), -1).requires_grad_()
    assert not host_reads(lambda: expected_overlap(log_p, mixed, tables)[1].sum().backward())
    assert not host_reads(lambda: grounding_similarity(mixed.answer_positions.label, mixed, tables))
    meta, table = mixed.to(torch.device("meta")), tables.to(torch.device("meta"))
    assert expected_overlap(log_p.detach().to("meta"), meta, table)[0].shape == (4,)
    assert grounding_similarity(meta.answer_positions.label, meta, table)[0].shape == (4,)


def test_a_task_with_its_own_text_of_a_world_box(
    monkeypatch: pytest.MonkeyPatch, batch_of: Any, worlds: list[Any], tables: Any
) -> None:
    class Spoken(ScanRefer):
        """Answers such as ``from (-1.75, 0.15, 0.02) to (-0.65, 0.95, 0.78)``."""

        name = "spoken"

        def parse(self, text: str, frame_count: int, box_format: Any = "camera") -> WorldGrounding:
            assert box_format == "world"
            parts = text.removeprefix("from (").removesuffix(")").replace(") to (", ", ").split(", ")
            if len(parts) != 6:
                raise AnswerError("it is not exactly six numbers")
            low, high = np.array(parts[:3], dtype=float), np.array(parts[3:], dtype=float)
            return WorldGrounding(np.concatenate([(low + high) / 2, high - low]))

    monkeypatch.setitem(TASKS, "spoken", Spoken())
    parts = worlds[0].answer.split(",")
    text = f"from ({', '.join(parts[:3])}) to ({', '.join(parts[3:])})"
    batch = batch_of([replace(worlds[0], task="spoken", answer=text), worlds[0]])
    teacher, _ = grounding_similarity(batch.answer_positions.label, batch, tables)
    decoded, valid = decoded_grounding_similarity([text, text], batch)
    assert teacher[0] == pytest.approx(float(teacher[1]), abs=1e-12) and teacher[0] > 0.95
    assert decoded.tolist() == [pytest.approx(float(teacher[0]), abs=1e-12), 0.0] and valid.tolist() == [True, False]
