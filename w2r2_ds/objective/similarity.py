"""s: how similar the shortcut's answer is to the label (paper, Eq. 6: IoU3D for grounding).

The answer is read from teacher-forced predictions, a named approximation of greedy decoding: every token is predicted
with the true tokens before it. A number is therefore cut at its first wrong digit, and half a unit of that digit's
place is added: with 3.02 as label, predicting 2 first reads as 2.5, where copying the later digits would read 2.02.
All of it is tensor arithmetic on the device of the predictions: nothing waits for the host.
"""

from __future__ import annotations

import torch

from w2r2_ds.data.boxes import camera_to_world_torch
from w2r2_ds.data.collate import AnswerRows, Batch
from w2r2_ds.data.iou import oriented_iou
from w2r2_ds.data.slots import TokenTables


def read_numbers(predicted: torch.Tensor, rows: AnswerRows, tables: TokenTables) -> torch.Tensor:
    """The numbers of teacher-forced predictions.

    Besides a wrong digit, the prediction may end a number early (1 for 12, read as 1) or go on where the label ends
    it (12 for 1, read as 12; 12.5 for a value, whose decimals are unknown). A frame index gets no half unit.

    Args:
        predicted: ``[rows]`` int64 predicted tokens.
        rows: the batch's answer rows; every number is followed by another answer token.
        tables: what a token means inside a number.

    Returns:
        ``[batch, NUMBERS]`` float64.
    """
    number, place = _with_token_after(rows)
    at = number.clamp(min=0)
    label, guess = rows.label[at], predicted[at]
    guess_digit = tables.digit[guess]
    is_digit = guess_digit >= 0
    # The token after a number (the last in its row) is right if it is no digit, whatever it is.
    ends = (number >= 0) & (tables.digit[label] < 0) & ~is_digit
    is_after = (number >= 0) & (number == number.amax(-1, keepdim=True))
    correct = (label == guess) | (number < 0) | (ends & is_after)
    before = (
        torch.cumprod(torch.cat([torch.ones_like(correct[..., :1]), correct[..., :-1]], dim=-1).long(), dim=-1) == 1
    )
    first_wrong = before & ~correct
    value = torch.where(before & is_digit, guess_digit * place, 0.0).sum(-1)

    def at_cut(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.where(first_wrong & where, values, 0.0).sum(-1)

    one = torch.ones_like(place)
    ended = at_cut(10 * place, ~is_digit & (place >= 1))
    longer = at_cut(one, is_digit & (place == 0)) == 1
    value = torch.where(ended > 0, value / ended.clamp(min=1), value)
    value = torch.where(longer, 10 * value + at_cut(guess_digit.to(place.dtype), is_digit), value)
    half_unit = at_cut(torch.where(place == 0, one, place) / 2, is_digit)
    half_unit[:, 0] = 0.0
    sign = torch.where(tables.minus[predicted[rows.lead]], -1.0, 1.0)
    return sign * (value + half_unit)


def _with_token_after(rows: AnswerRows) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.number` and `rows.place` with one more entry per number: the token after it, in the next smaller place."""
    last = (rows.number >= 0).sum(-1, keepdim=True)
    has_point = ((rows.number >= 0) & (rows.place == 0)).any(-1, keepdim=True)
    finest = rows.place.gather(-1, last - 1) / 10
    number = torch.nn.functional.pad(rows.number, (0, 1), value=-1)
    place = torch.nn.functional.pad(rows.place, (0, 1))
    number = number.scatter(-1, last, rows.number.gather(-1, last - 1) + 1)
    return number, place.scatter(-1, last, torch.where(has_point, finest, 0.0))


def grounding_similarity(predicted: torch.Tensor, batch: Batch, tables: TokenTables) -> torch.Tensor:
    """IoU3D in the world of the predicted box, in the predicted frame's camera, with the label's box.

    Invalid answers (no such frame, a size that is not positive) have similarity 0.

    Args:
        predicted: ``[rows]`` int64 predicted tokens.

    Returns:
        ``[batch]`` float64 in [0, 1].
    """
    numbers = read_numbers(predicted, batch.answer_rows, tables)
    frame, boxes = numbers[:, 0].long(), numbers[:, 1:]
    frames = batch.cam_to_world.shape[1]
    valid = (frame >= 0) & (frame < frames) & (boxes[:, 3:6] > 0).all(-1)
    pose = batch.cam_to_world[torch.arange(len(frame), device=frame.device), frame.clamp(0, frames - 1)]
    identity = torch.eye(4, dtype=pose.dtype, device=pose.device).expand_as(pose)
    iou = oriented_iou(*camera_to_world_torch(boxes, pose), *camera_to_world_torch(batch.target_box, identity))
    return torch.where(valid, iou, 0.0)
