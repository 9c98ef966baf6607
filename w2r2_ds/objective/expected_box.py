"""The expected box: every digit is the mean of its predicted distribution, so that the box is differentiable.

    E[d] = sum_d d p(d) / sum_d p(d)                       over the ten digits, at every digit token of the label
    E[number] = (1 - 2 P(minus)) * sum_digits place E[d]    P(minus): of all tokens that end with a minus, at the lead

Teacher-forced: each distribution is conditioned on the label's tokens before it. So is the box's frame, the label's.
Digits are averaged each on its own: with 3.02 as label, equal probabilities of 2 and 3 for the first digit give 2.52.
Nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2r2_ds.boxes3d.giou import oriented_giou
from w2r2_ds.boxes3d.transforms import camera_to_world_torch
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.objective.similarity import frame_poses, has_numbers, read_numbers, world_parts
from w2r2_ds.types.batch import AnswerPositions, Batch

MOST_DIGIT_TOKENS = 128
"""Most vocabulary entries that spell a digit. A constant, so that the size of tensors needs no copy to the host."""

IMPOSSIBLE = -1e30
"""Log-probability that stands in for minus infinity: ten impossible digits are then equally likely, not 0 / 0."""


def expected_numbers(log_p: Tensor, rows: AnswerPositions, tables: TokenTables) -> Tensor:
    """Digit-wise expectation of every number.

    Args:
        log_p: ``[rows, vocabulary]`` log-probabilities, normalised.
        rows: the batch's answer rows.
        tables: what a token means inside a number.

    Returns:
        ``[batch, NUMBERS]`` of the dtype of `log_p`, float32 where that is narrower; 0, and without gradient, for a
        sample without digit tokens.
    """
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
    digits = _expected_digits(log_p, tables)
    row = rows.digit.clamp(min=0)
    at_digit = digits.gather(0, row.flatten()).view_as(row) * rows.place_value.to(digits.dtype)
    magnitude = torch.where(rows.digit >= 0, at_digit, 0.0).sum(-1)
    lead = log_p.index_select(0, rows.sign.flatten())
    minus = (lead.exp() * tables.minus).sum(-1).view_as(rows.sign)
    return (1 - 2 * minus) * magnitude


def expected_overlap(log_p: Tensor, batch: Batch, tables: TokenTables) -> tuple[Tensor, Tensor, Tensor]:
    """IoU3D and GIoU of the expected box, in the camera of the label's frame, with the label's box in the world.

    An expected box with a size that is not positive (its sign is more likely a minus) has IoU 0, GIoU -1, no gradient.

    Args:
        log_p: ``[rows, vocabulary]`` log-probabilities, normalised.

    Returns:
        IoU ``[batch]`` and GIoU ``[batch]`` (``boxes3d/giou.py``, along the target's axes), float64, both 0 and without
        gradient for a sample without digit tokens; and ``[batch]`` bool, the sample has a box.
    """
    rows = batch.answer_positions
    frame = read_numbers(rows.label, rows, tables)[:, 0].long()
    pose, exists = frame_poses(batch.cam_to_world, frame)
    has_box = has_numbers(rows) & exists & batch.target_box.isfinite().all(-1)
    boxes = expected_numbers(log_p, rows, tables)[:, 1:].double()
    iou, giou = oriented_giou(*camera_to_world_torch(boxes, pose), *world_parts(batch.target_box))
    return torch.where(has_box, iou, 0.0), torch.where(has_box, giou, 0.0), has_box


def _expected_digits(log_p: Tensor, tables: TokenTables) -> Tensor:
    """``[rows]`` E[d] of the next token, given that it is a digit; tokens that spell the same digit count together."""
    value, token = tables.digit.topk(min(MOST_DIGIT_TOKENS, len(tables.digit)))
    spells = value >= 0
    likely = log_p.index_select(1, token).clamp(min=IMPOSSIBLE)
    share = torch.where(spells, likely, -torch.inf).softmax(-1)
    expected = (share * value.clamp(min=0)).sum(-1)
    # If the digit tokens did not all fit, the result is NaN, not a number without a digit.
    overfull = spells[-1] & (len(tables.digit) > MOST_DIGIT_TOKENS)
    return torch.where(overfull, torch.nan, expected)
