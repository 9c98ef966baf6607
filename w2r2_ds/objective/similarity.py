"""Similarity s of an answer to its label (Eq. 6): IoU3D for grounding, word overlap for captions and short answers.

Greedy decoding of the shortcut defines its answer (`decoded_grounding_similarity`). Teacher-forced predictions are a
cheaper approximation: every token is predicted after the true tokens before it. A number is therefore cut at its first
wrong digit, and half a unit of that digit's place is added: with label 3.02 and 2 predicted first, the number is 2.5,
where the later true digits would make it 2.02. This is tensor arithmetic on the device of the predictions and needs no
synchronisation for grounding samples; captions and short answers copy their tokens to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from w2r2_ds.boxes3d.iou import oriented_iou
from w2r2_ds.boxes3d.transforms import camera_to_world_torch, rotation_matrix_torch
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.parsing import AnswerError
from w2r2_ds.types.batch import AnswerPositions, Batch


def read_numbers(predicted: torch.Tensor, rows: AnswerPositions, tables: TokenTables) -> torch.Tensor:
    """The numbers of teacher-forced predictions.

    Besides a wrong digit, the prediction may end a number early (1 for 12, read as 1) or go on where the label ends
    it (12 for 1, read as 12; 12.5 for a value, whose decimals are unknown). A frame index gets no half unit.

    Args:
        predicted: ``[rows]`` int64 predicted tokens.
        rows: the batch's answer rows; every number is followed by another answer token.
        tables: what a token means inside a number.

    Returns:
        ``[batch, NUMBERS]`` float64, 0 for a sample without digit tokens.
    """
    number, place = _with_token_after(rows)
    at = number.clamp(min=0)
    label, guess = rows.label[at], predicted[at]
    guess_digit = tables.digit[guess]
    is_digit = guess_digit >= 0
    # The token after a number (the last in its row) is right if it is not a digit.
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
    sign = torch.where(tables.minus[predicted[rows.sign]], -1.0, 1.0)
    return sign * (value + half_unit)


def _with_token_after(rows: AnswerPositions) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.digit` and `rows.place_value` with one more entry per number: the token after it, one place smaller."""
    number = torch.nn.functional.pad(rows.digit, (0, 1), value=-1)
    place = torch.nn.functional.pad(rows.place_value, (0, 1))
    after = (rows.digit >= 0).sum(-1, keepdim=True)
    last = (after - 1).clamp(min=0)
    has_point = ((number >= 0) & (place == 0)).any(-1, keepdim=True)
    # Where there is no number, there is none after it either.
    row = torch.where(after > 0, number.gather(-1, last) + 1, -1)
    finest = torch.where(has_point, place.gather(-1, last) / 10, 0.0)
    return number.scatter(-1, after, row), place.scatter(-1, after, finest)


def has_numbers(rows: AnswerPositions) -> torch.Tensor:
    """``[batch]`` bool: the sample's answer has digit tokens."""
    return (rows.digit >= 0).any(-1).all(-1)


def grounding_similarity(
    predicted: torch.Tensor, batch: Batch, tables: TokenTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU3D in the world of the predicted box, in the predicted frame's camera, with the label's box.

    Args:
        predicted: ``[rows]`` int64 teacher-forced predictions.

    Returns:
        s ``[batch]`` float64 in [0, 1], and ``[batch]`` bool: the answer names a frame of the sample and a box with
        positive sizes. s is 0 where it does not, and for a sample without digit tokens.
    """
    numbers = read_numbers(predicted, batch.answer_positions, tables)
    valid = has_numbers(batch.answer_positions)
    return _placed_iou(numbers[:, 0].long(), numbers[:, 1:], valid, batch.cam_to_world, batch.target_box)


def decoded_grounding_similarity(texts: Sequence[str], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`grounding_similarity` of decoded answers, parsed by their tasks (`Task.parse`), on the CPU.

    Args:
        texts: a decoded answer per sample, without special tokens; those of other kinds are not used.
        batch: on any device; poses that are NaN are no frames.

    Returns:
        s ``[batch]`` float64 in [0, 1] and ``[batch]`` bool, the answer could be read; 0 and False for other kinds.
    """
    poses, target = batch.cam_to_world.cpu(), batch.target_box.cpu()
    counts = poses.isfinite().flatten(2).all(-1).sum(-1).tolist()
    frame = torch.zeros(len(target), dtype=torch.int64)
    boxes = torch.zeros(len(target), 9, dtype=torch.float64)
    read = torch.zeros(len(target), dtype=torch.bool)
    for index, (text, task, kind, count) in enumerate(zip(texts, batch.tasks, batch.kinds, counts, strict=True)):
        if kind != "grounding":
            continue
        try:
            answer = TASKS.find(task).parse(text, count)
        except AnswerError:
            continue
        frame[index], boxes[index], read[index] = answer.frame, torch.from_numpy(answer.box), True
    return _placed_iou(frame, boxes, read, poses, target)


def read_texts(predicted: torch.Tensor, batch: Batch, decode: Callable[[list[int]], str]) -> list[str]:
    """The texts of teacher-forced predictions, for captions and short answers.

    Each token is predicted with the true ones before it; a text ends where the end of turn is predicted first.

    Args:
        predicted: ``[rows]`` int64 predicted tokens.
        decode: tokens to text, without special tokens.

    Returns:
        A text per sample; ``""`` for grounding samples. A batch without others does not wait for the device.
    """
    texts = [""] * len(batch.kinds)
    if not has_text(batch):
        return texts
    rows = batch.answer_positions
    sample, label, guess = torch.stack((rows.sample, rows.label, predicted)).tolist()
    for index, kind in enumerate(batch.kinds):
        if kind == "grounding":
            continue
        mine = [row for row, owner in enumerate(sample) if owner == index]
        if not mine:  # every answer token is masked
            continue
        tokens, end = [guess[row] for row in mine], label[mine[-1]]
        texts[index] = decode(tokens[: tokens.index(end)] if end in tokens else tokens)
    return texts


def has_text(batch: Batch) -> bool:
    """Whether a sample of the batch is compared by its words; known on the host."""
    return any(kind != "grounding" for kind in batch.kinds)


def similarity(grounding: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """s of a batch of several tasks; the kind of a sample selects its similarity.

    Args:
        grounding: ``[batch]`` s of `grounding_similarity` or its decoded twin, 0 for captions and answers.
        text: ``[batch]`` s of ``text.text_similarity``, 0 for grounding, on any device; None where `has_text` is
            False, and then nothing moves.

    Returns:
        ``[batch]`` float64 on the device of `grounding`.
    """
    return grounding if text is None else grounding + text.to(grounding.device, non_blocking=True)


def frame_poses(cam_to_world: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pose of one frame per sample; the identity where the sample has no such frame.

    Args:
        cam_to_world: ``[batch, frames, 4, 4]``, NaN for frames that do not exist.
        frame: ``[batch]`` int64, any number.

    Returns:
        ``[batch, 4, 4]`` and ``[batch]`` bool, the frame exists.
    """
    frames = cam_to_world.shape[1]
    pose = cam_to_world[torch.arange(len(frame), device=frame.device), frame.clamp(0, frames - 1)]
    exists = (frame >= 0) & (frame < frames) & pose.isfinite().flatten(1).all(-1)
    identity = torch.eye(4, dtype=pose.dtype, device=pose.device)
    return torch.where(exists[:, None, None], pose, identity), exists


def world_parts(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre, size and rotation of world boxes ``[n, 9]``, as `camera_to_world_torch` gives them for camera boxes."""
    return boxes[:, :3], boxes[:, 3:6], rotation_matrix_torch(boxes[:, 6:])


def _placed_iou(
    frame: torch.Tensor, boxes: torch.Tensor, read: torch.Tensor, cam_to_world: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU in the world of camera boxes with the target, and which of them are boxes in a frame that exists.

    Args:
        frame: ``[batch]`` int64.
        boxes: ``[batch, 9]`` float64 in the frame's camera.
        read: ``[batch]`` bool, False if the text is not a valid answer.
        cam_to_world: ``[batch, frames, 4, 4]``.
        target: ``[batch, 9]`` world.
    """
    pose, exists = frame_poses(cam_to_world, frame)
    valid = read & exists & (boxes[:, 3:6] > 0).all(-1)
    iou = oriented_iou(*camera_to_world_torch(boxes, pose), *world_parts(target))
    return torch.where(valid, iou, 0.0), valid
