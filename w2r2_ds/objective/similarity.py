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

    Args:
        predicted: ``[rows]`` int64 predicted tokens.
        rows: the batch's answer rows.
        tables: what a token means inside a number.

    Returns:
        ``[batch, NUMBERS]`` float64. A number that ends early is read as far as it goes.
    """
    inside = rows.number >= 0
    at = rows.number.clamp(min=0)
    true, guess = rows.label[at], predicted[at]
    correct = (true == guess) | ~inside
    prefix = torch.cumprod(correct.long(), dim=-1)
    before = torch.cat([torch.ones_like(prefix[..., :1]), prefix[..., :-1]], dim=-1)
    digit = tables.digit[guess]
    is_digit = (digit >= 0) & (rows.place > 0)
    first_wrong = (before == 1) & ~correct & is_digit
    value = torch.where(is_digit & (before == 1), digit * rows.place, 0.0)
    half_unit = torch.where(first_wrong, rows.place / 2, 0.0)
    # A cut frame index stays an integer: its half unit is dropped.
    half_unit[:, 0] = 0.0
    sign = torch.where(tables.minus[predicted[rows.lead]], -1.0, 1.0)
    return sign * (value + half_unit).sum(-1)


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
