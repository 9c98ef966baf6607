"""The expected box: every digit is the mean of its predicted distribution, which makes the box differentiable.

    E[d] = sum_d d p(d) / sum_d p(d)                         over the ten digits, at every digit token of the label
    E[number] = (1 - 2 P(minus)) * sum_digits place E[d]     P(minus): probability of all tokens that end with a minus
                                                             sign, at the token before the first digit

The predictions are teacher-forced, so each distribution is conditioned on the label's tokens before it; the frame of a
camera box is the label's too. The corners of a world box are expected numbers, its centre and size follow from them.
Digits are averaged independently: for the label 3.02, equal probabilities of 2 and 3 at the first digit give 2.52. No
operation synchronizes with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.boxes3d.giou import oriented_giou
from w2r2_ds.boxes3d.transforms import camera_to_world_torch
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.objective.similarity import (
    answer_boxes,
    box_poses,
    center_size_rotation,
    has_numbers,
    predicted_numbers,
)
from w2r2_ds.types.batch import AnswerPositions, Batch

MAX_DIGIT_TOKENS = 128
"""Largest number of vocabulary entries that spell a digit. A constant, so that no tensor size is read on the host."""

MIN_LOG_P = -1e30
"""Lower bound of a digit's log-probability, for minus infinity: ten impossible digits are equally likely, not 0 / 0."""


def expected_numbers(log_p: Tensor, positions: AnswerPositions, tables: TokenTables) -> Tensor:
    """Digit-wise expectation of every number.

    Args:
        log_p: ``[answer tokens, vocabulary]`` log-probabilities, normalised.
        positions: digit and sign tokens of the batch's answers.
        tables: digit and sign of every token of the vocabulary.

    Returns:
        ``[batch, MAX_NUMBERS]`` in the dtype of `log_p`, at least float32; 0 without gradient for a sample without
        digit tokens and after the last number of a box format.
    """
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
    digits = _expected_digits(log_p, tables)
    index = positions.digit.clamp(min=0)  # padding is -1
    terms = digits.gather(0, index.flatten()).view_as(index) * positions.place_value.to(digits.dtype)
    magnitude = torch.where(positions.digit >= 0, terms, 0.0).sum(-1)
    sign_log_p = log_p.index_select(0, positions.sign.flatten())
    p_minus = (sign_log_p.exp() * tables.minus).sum(-1).view_as(positions.sign)
    return (1 - 2 * p_minus) * magnitude


def expected_overlap(log_p: Tensor, batch: Batch, tables: TokenTables) -> tuple[Tensor, Tensor, Tensor]:
    """IoU3D and GIoU of the expected box with the label's box, in world coordinates.

    The expected box is in the world or in the camera of the label's frame, by the sample's box format. With a size that
    is not positive it has IoU 0 and GIoU -1, without gradient: in a camera if a minus sign is more likely than not, in
    the world if an expected highest coordinate is not above the lowest.

    Args:
        log_p: ``[answer tokens, vocabulary]`` log-probabilities, normalised.
        batch: labels, poses and target boxes.
        tables: digit and sign of every token of the vocabulary.

    Returns:
        IoU and GIoU, ``[batch]`` float64 each (GIoU along the target's axes, `boxes3d/giou.py`); and ``[batch]`` bool,
        the sample has a box. Without a box both are 0, without gradient.
    """
    positions = batch.answer_positions
    # Predictions equal to the labels give the label's own numbers.
    frame = predicted_numbers(positions.label, positions, tables)[:, 0].long()
    pose, exists = box_poses(batch.cam_to_world, frame, positions.in_world)
    has_box = has_numbers(positions) & exists & batch.target_box.isfinite().all(-1)
    boxes = answer_boxes(expected_numbers(log_p, positions, tables).double(), positions.in_world)
    iou, giou = oriented_giou(*camera_to_world_torch(boxes, pose), *center_size_rotation(batch.target_box))
    return torch.where(has_box, iou, 0.0), torch.where(has_box, giou, 0.0), has_box


def _expected_digits(log_p: Tensor, tables: TokenTables) -> Tensor:
    """``[answer tokens]`` E[d] of the next token, given that it is a digit. Tokens of the same digit are summed."""
    # The entries with the largest digits; other tokens of the vocabulary have -1. `topk` has a fixed output size,
    # while a boolean mask would copy its number of elements to the host.
    digit, token = tables.digit.topk(min(MAX_DIGIT_TOKENS, len(tables.digit)))
    is_digit = digit >= 0
    digit_log_p = log_p.index_select(1, token).clamp(min=MIN_LOG_P)
    probability = torch.where(is_digit, digit_log_p, -torch.inf).softmax(-1)
    expected = (probability * digit.clamp(min=0)).sum(-1)
    # NaN, instead of a wrong number, if the vocabulary may have more digit tokens than `topk` returns.
    too_many = is_digit[-1] & (len(tables.digit) > MAX_DIGIT_TOKENS)
    return torch.where(too_many, torch.nan, expected)
