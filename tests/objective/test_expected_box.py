"""Expected numbers and the overlap of expected boxes: hand values, finite differences, samples without boxes."""

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
from w2r2_ds.boxes3d.giou import box_giou
from w2r2_ds.boxes3d.transforms import camera_to_world
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.objective.expected_box import MAX_DIGIT_TOKENS, expected_numbers, expected_overlap
from w2r2_ds.objective.similarity import predicted_numbers

VALUES = [-0.63, 12.4, 3.02, 3.0, 0.59, 2.35, -2.32, 1.18, 0.05]


@pytest.fixture
def batch(batch_of: Any, samples: list[Any]) -> Any:
    """Answers whose numbers have different lengths."""
    first = replace(samples[0], answer=f'{{"frame": 2, "bbox_3d": {VALUES}}}')
    longer = f'{{"frame": 12, "bbox_3d": {VALUES}}}'.replace(" 3.0,", " 103.25,")
    return batch_of([first, replace(samples[2], answer=longer)])


@pytest.fixture
def mixed(batch_of: Any, samples: list[Any]) -> Any:
    """A caption without a target, a box, a short answer without frames."""
    caption = replace(samples[0], answer="7 red chairs.", kind="caption", target=None, what=(0, 0))
    nowhere = {"frames": (), "cam_to_world": np.zeros((0, 4, 4)), "what": (0, 0)}
    answer = replace(samples[2], answer="brown", kind="answer", target=None, **nowhere)
    return batch_of([caption, samples[1], answer])


@pytest.fixture
def token(frontend: Any) -> Callable[[str], int]:
    return frontend.tokenizer.convert_tokens_to_ids


def sure(labels: Tensor, vocabulary: int) -> Tensor:
    """``[answer tokens, vocabulary]`` float64 log-probabilities: 1 for the label."""
    return torch.full((len(labels), vocabulary), -math.inf, dtype=torch.float64).scatter(1, labels[:, None], 0.0)


def noise(batch: Any, tables: Any, seed: int = 0, trust: float = 6.0) -> Tensor:
    """``[answer tokens, vocabulary]`` float64 random logits, raised by `trust` at the label."""
    labels = batch.answer_positions.label
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(labels), len(tables.digit), generator=draw, dtype=torch.float64)
    return logits.scatter_add(1, labels[:, None], torch.full_like(logits[:, :1], trust))


def mixture(log_p: Tensor, row: Any, shares: dict[int, float]) -> None:
    """Replace the distribution of one answer token by one over few tokens."""
    log_p[int(row)] = -math.inf
    for index, share in shares.items():
        log_p[int(row), index] = math.log(share)


def test_certain_predictions_give_the_labels_numbers(batch: Any, tables: Any) -> None:
    rows = batch.answer_positions
    numbers = expected_numbers(sure(rows.label, len(tables.digit)), rows, tables)
    assert numbers.dtype == torch.float64
    torch.testing.assert_close(numbers, predicted_numbers(rows.label, rows, tables), atol=1e-12, rtol=0)
    assert numbers[0].tolist() == pytest.approx([2, *VALUES], abs=1e-12)
    assert numbers[1].tolist() == pytest.approx([12, *VALUES[:3], 103.25, *VALUES[4:]], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(batch: Any, tables: Any, dtype: torch.dtype) -> None:
    rows = batch.answer_positions
    numbers = expected_numbers(sure(rows.label, len(tables.digit)).to(dtype), rows, tables)
    assert numbers.dtype == torch.float32
    torch.testing.assert_close(numbers[0], torch.tensor([2, *VALUES]), atol=1e-5, rtol=0)


def test_expected_numbers_by_hand(batch: Any, tables: Any, token: Callable[[str], int]) -> None:
    """3.02 and -2.32, and a frame index of two digits."""
    rows = batch.answer_positions
    log_p = sure(rows.label, len(tables.digit))
    # A quarter of the probability is on digits, 0.2 of it on 2 and 0.8 on 3; the rest is on other tokens.
    mixture(log_p, rows.digit[0, 3, 0], {token("2"): 0.05, token("3"): 0.2, token(","): 0.5, token("}"): 0.25})
    mixture(log_p, rows.digit[0, 3, 3], {token("0"): 0.5, token("9"): 0.5})
    # The sign of -2.32: a minus with probability 0.7 of the whole.
    mixture(log_p, rows.sign[0, 7], {token("-"): 0.7, token("Ġ"): 0.1, token("3"): 0.2})
    mixture(log_p, rows.digit[1, 0, 1], {token("1"): 0.1, token("2"): 0.9})
    numbers = expected_numbers(log_p, rows, tables)
    certain = predicted_numbers(rows.label, rows, tables)
    expected = certain.clone()
    expected[0, 3] = (0.2 * 2 + 0.8 * 3) + 0.0 + 0.01 * 4.5
    expected[0, 7] = (1 - 2 * 0.7) * 2.32
    expected[1, 0] = 10 + 1.9
    assert not torch.equal(expected, certain)
    torch.testing.assert_close(numbers, expected, atol=1e-12, rtol=0)


def test_probabilities_of_tokens_of_the_same_digit_are_summed(
    batch: Any, tables: Any, token: Callable[[str], int]
) -> None:
    rows = batch.answer_positions
    other = token("}")
    digit = tables.digit.clone()
    digit[other] = 2
    log_p = sure(rows.label, len(tables.digit))
    mixture(log_p, rows.digit[0, 3, 0], {token("2"): 0.1, other: 0.3, token("3"): 0.4, token(","): 0.2})
    numbers = expected_numbers(log_p, rows, TokenTables(digit, tables.minus))
    assert float(numbers[0, 3]) == pytest.approx((0.4 * 2 + 0.4 * 3) / 0.8 + 0.02, abs=1e-12)


def test_too_many_digit_tokens_give_nan(batch: Any, tables: Any) -> None:
    rows = batch.answer_positions
    digit = tables.digit.clone()
    digit[: MAX_DIGIT_TOKENS + 1] = 5
    assert len(digit) > MAX_DIGIT_TOKENS + 10
    log_p = torch.log_softmax(noise(batch, tables), -1)
    assert expected_numbers(log_p, rows, TokenTables(digit, tables.minus)).isnan().all()


@pytest.mark.parametrize("depth", [100.0, 3000.0])
def test_very_unlikely_digits(batch: Any, tables: Any, token: Callable[[str], int], depth: float) -> None:
    """In float32, e^-104 is 0. Only the ratios of the digits matter, and they keep their gradient."""
    rows = batch.answer_positions
    row = int(rows.digit[0, 3, 0])
    logits = torch.where(sure(rows.label, len(tables.digit)) == 0, 20.0, 0.0).float()
    logits[row] = -depth
    logits[row, token(",")] = 0.0
    logits[row, token("2")], logits[row, token("3")] = -depth + math.log(30), -depth + math.log(10)
    log_p = torch.log_softmax(logits, -1).requires_grad_()
    number = expected_numbers(log_p, rows, tables)[0, 3]
    digits = (30 * 2 + 10 * 3 + 0 + 1 + 4 + 5 + 6 + 7 + 8 + 9) / 48
    assert float(number.detach()) == pytest.approx(digits + 0.02, abs=1e-3)
    (gradient,) = torch.autograd.grad(number, log_p)
    assert gradient.isfinite().all()
    assert float(gradient[row, token("2")]) == pytest.approx(30 / 48 * (2 - digits), abs=1e-3)
    assert float(gradient[row, token("3")]) == pytest.approx(10 / 48 * (3 - digits), abs=1e-3)


def test_impossible_digits_are_equally_likely(batch: Any, tables: Any, token: Callable[[str], int]) -> None:
    rows = batch.answer_positions
    log_p = sure(rows.label, len(tables.digit))
    mixture(log_p, rows.digit[0, 3, 0], {token(","): 1.0})
    log_p.requires_grad_()
    numbers = expected_numbers(log_p, rows, tables)
    assert float(numbers[0, 3].detach()) == pytest.approx(4.52, abs=1e-12)
    (gradient,) = torch.autograd.grad(numbers.sum(), log_p)
    assert gradient.isfinite().all() and not gradient[rows.digit[0, 3, 0]].any()


def test_gradient_of_numbers_matches_finite_differences(batch: Any, tables: Any) -> None:
    rows = batch.answer_positions
    logits = noise(batch, tables, trust=2.0)[:, :64].contiguous().requires_grad_()
    small = TokenTables(tables.digit[:64], tables.minus[:64])
    assert (small.digit >= 0).sum() == 10 and small.minus.any()

    def numbers(values: Tensor) -> Tensor:
        return expected_numbers(torch.log_softmax(values, -1), rows, small)

    assert torch.autograd.gradcheck(numbers, (logits,), eps=1e-6, atol=1e-7, fast_mode=True)


def test_only_digit_tokens_and_signs_have_a_gradient(batch: Any, tables: Any) -> None:
    """At these positions, only digits and minus signs of the vocabulary. Log-probabilities are leaves here."""
    rows = batch.answer_positions
    log_p = torch.log_softmax(noise(batch, tables, trust=2.0), -1).requires_grad_()
    expected_numbers(log_p, rows, tables).sum().backward()
    assert log_p.grad is not None
    touched = log_p.grad.abs().sum(-1) > 0
    digits = torch.zeros_like(touched)
    digits[rows.digit[(rows.digit >= 0) & (rows.place_value > 0)]] = True
    signs = torch.zeros_like(touched)
    signs[rows.sign.flatten()] = True
    assert digits.sum() == rows.where.sum()
    assert torch.equal(touched, digits | signs)
    assert not log_p.grad[digits & ~signs][:, tables.digit < 0].any()
    assert not log_p.grad[signs & ~digits][:, ~tables.minus].any()


def test_overlap_is_that_of_the_expected_box_in_the_labels_frame(
    batch_of: Any, samples: list[Any], tables: Any
) -> None:
    batch = batch_of(samples)
    log_p = torch.log_softmax(noise(batch, tables, trust=8.0), -1)
    iou, giou, has_box = expected_overlap(log_p, batch, tables)
    assert iou.dtype == giou.dtype == torch.float64 and has_box.tolist() == [True] * 3
    numbers = expected_numbers(log_p, batch.answer_positions, tables).numpy()
    for index, (sample, frame) in enumerate(zip(samples, (2, 0, 11), strict=True)):
        world = camera_to_world(numbers[index, 1:], sample.cam_to_world[frame])
        pair = torch.from_numpy(np.stack([world, sample.target.box]))
        expected = box_giou(pair[:1], pair[1:])
        assert float(iou[index]) == pytest.approx(float(expected[0]), abs=1e-9)
        assert float(giou[index]) == pytest.approx(float(expected[1]), abs=1e-9)
        assert 0.1 < iou[index] < 0.99 and giou[index] < iou[index]


def test_certain_boxes_overlap_up_to_rounding(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    iou, giou, _ = expected_overlap(sure(batch.answer_positions.label, len(tables.digit)), batch, tables)
    assert (iou > 0.95).all() and (giou > 0.9).all() and (giou <= iou).all()


def test_gradient_of_overlap_matches_finite_differences(batch_of: Any, samples: list[Any], tables: Any) -> None:
    batch = batch_of(samples)
    logits = noise(batch, tables).requires_grad_()

    def overlap(values: Tensor) -> tuple[Tensor, Tensor]:
        return expected_overlap(torch.log_softmax(values, -1), batch, tables)[:2]

    assert torch.autograd.gradcheck(overlap, (logits,), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.slow
def test_gradient_ascent_reaches_the_box(batch_of: Any, samples: list[Any], tables: Any) -> None:
    """From nearly uninformative digits and no overlap, ascent on GIoU leads to an overlap."""
    batch = batch_of(samples[:1])
    logits = noise(batch, tables, trust=2.0).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    before = expected_overlap(torch.log_softmax(logits, -1), batch, tables)
    assert before[0].item() == 0
    for _ in range(100):
        optimiser.zero_grad()
        (-expected_overlap(torch.log_softmax(logits, -1), batch, tables)[1]).sum().backward()
        optimiser.step()
    assert expected_overlap(torch.log_softmax(logits, -1), batch, tables)[0].item() > 0.7


def test_samples_without_a_box_contribute_nothing(mixed: Any, batch_of: Any, samples: list[Any], tables: Any) -> None:
    rows = mixed.answer_positions
    log_p = torch.log_softmax(noise(mixed, tables), -1).requires_grad_()
    numbers = expected_numbers(log_p, rows, tables)
    assert not numbers[[0, 2]].any()
    iou, giou, has_box = expected_overlap(log_p, mixed, tables)
    assert has_box.tolist() == [False, True, False]
    assert iou[[0, 2]].tolist() == giou[[0, 2]].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad((iou + giou).sum(), log_p)
    assert gradient.isfinite().all()
    assert not gradient[rows.sample != 1].any() and gradient[rows.sample == 1].any()

    alone = batch_of([samples[1]])
    own = log_p.detach()[rows.sample == 1].requires_grad_()
    values = expected_overlap(own, alone, tables)
    torch.testing.assert_close(torch.stack([iou[1], giou[1]]), torch.cat(values[:2]))
    torch.testing.assert_close(gradient[rows.sample == 1], torch.autograd.grad(values[0] + values[1], own)[0])


def test_a_negative_size_has_the_lowest_overlap_and_no_gradient(
    batch_of: Any, samples: list[Any], tables: Any, token: Callable[[str], int]
) -> None:
    batch = batch_of(samples[:2])
    rows = batch.answer_positions
    log_p = sure(rows.label, len(tables.digit))
    mixture(log_p, rows.sign[0, 5], {token("-"): 0.8, token("Ġ"): 0.2})
    log_p.requires_grad_()
    iou, giou, has_box = expected_overlap(log_p, batch, tables)
    assert has_box.all() and iou[0] == 0 and giou[0] == -1 and giou[1] > 0.9
    (gradient,) = torch.autograd.grad(giou.sum(), log_p)
    assert gradient.isfinite().all() and not gradient[rows.sample == 0].any()


def test_no_synchronization(batch_of: Any, samples: list[Any], tables: Any) -> None:
    """Forward and backward; the meta device, which has no values, works too."""
    batch = batch_of(samples)
    log_p = torch.log_softmax(noise(batch, tables), -1).requires_grad_()
    assert not host_reads(lambda: expected_overlap(log_p, batch, tables)[1].sum().backward())
    device = torch.device("meta")
    values = expected_overlap(log_p.detach().to(device), batch.to(device), tables.to(device))
    assert [value.shape for value in values] == [(3,)] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_equals_cpu_without_a_sync(mixed: Any, tables: Any) -> None:
    log_p = torch.log_softmax(noise(mixed, tables), -1)
    device = torch.device("cuda")
    there, batch, table = log_p.to(device).requires_grad_(), mixed.to(device), tables.to(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iou, giou, _ = expected_overlap(there, batch, table)
        giou.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = expected_overlap(log_p, mixed, tables)
    torch.testing.assert_close(iou.cpu(), expected[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(giou.detach().cpu(), expected[1], atol=1e-10, rtol=0)
