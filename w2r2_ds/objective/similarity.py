"""Similarity s of an answer to its label (Eq. 6): IoU3D for grounding. Texts are compared in `text_similarity.py`.

The shortcut's answer is defined by greedy decoding (`decoded_grounding_similarity`). Teacher-forced predictions are a
cheaper approximation (`grounding_similarity`): every token is predicted from the label's tokens before it. A number is
therefore cut at its first wrong digit, and half a unit of that digit's place is added. Example: the label is 3.02 and
the first predicted digit is 2. The number is 2.5; with the later digits, which were predicted after a 3, it would be
2.02. All of this is tensor arithmetic on the device of the predictions, without synchronization with the host. Only
captions and short answers copy their tokens to the host (`predicted_texts`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from w2r2_ds.boxes3d.iou import oriented_iou
from w2r2_ds.boxes3d.transforms import camera_to_world_torch, euler_angles_to_matrix_torch
from w2r2_ds.data.answer_tokens import TokenTables
from w2r2_ds.data.tasks.base import TASKS
from w2r2_ds.data.tasks.parsing import AnswerError, WorldGrounding
from w2r2_ds.models.family import cut_at_end
from w2r2_ds.types.batch import AnswerPositions, Batch


def predicted_numbers(predicted: torch.Tensor, positions: AnswerPositions, tables: TokenTables) -> torch.Tensor:
    """Numbers of teacher-forced predictions: frame index and box values, or the corners of a world box.

    Besides a wrong digit, a prediction may end a number early (``1`` for the label 12 is 1), or continue where the
    label ends or has its decimal point (``12`` for the label 1 is 12, plus half a unit for its unknown decimals). A
    frame index is an integer: no half unit is added.

    Args:
        predicted: ``[answer tokens]`` int64, most likely token at every answer position.
        positions: labels and digit tokens of the batch; every number is followed by another answer token.
        tables: digit and sign of every token of the vocabulary.

    Returns:
        ``[batch, MAX_NUMBERS]`` float64, 0 for a sample without digit tokens and after the last number of a box format.
    """
    index, place = _with_next_token(positions)
    label, guess = positions.label[index.clamp(min=0)], predicted[index.clamp(min=0)]
    digit = tables.digit[guess]
    is_digit = digit >= 0
    # The token after a number is correct if it is no digit: another comma or bracket does not change the number.
    is_next = (index >= 0) & (index == index.amax(-1, keepdim=True))
    correct = (label == guess) | (index < 0) | (is_next & (tables.digit[label] < 0) & ~is_digit)
    # Tokens up to and including the first wrong one: a cumulative product of `correct`, shifted by one token.
    no_error_before = torch.cat([torch.ones_like(correct[..., :1]), correct[..., :-1]], dim=-1).long()
    counted = torch.cumprod(no_error_before, dim=-1) == 1
    first_wrong = counted & ~correct

    def at_first_wrong(values: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """``[batch, MAX_NUMBERS]`` value at a number's first wrong token, 0 unless the condition holds there."""
        return torch.where(first_wrong & condition, values, 0.0).sum(-1)

    one = torch.ones_like(place)
    # Place values are the label's: 10, 1, 0.1, ...
    value = torch.where(counted & is_digit, digit * place, 0.0).sum(-1)
    # A number that ends before its units has too large place values: "1," for 12 is 10 so far, and is divided by 10.
    too_large = at_first_wrong(10 * place, ~is_digit & (place >= 1))
    value = torch.where(too_large > 0, value / too_large.clamp(min=1), value)
    # A digit instead of the decimal point, or after an integer (place 0), shifts the number by one place.
    is_longer = at_first_wrong(one, is_digit & (place == 0)) == 1
    value = torch.where(is_longer, 10 * value + at_first_wrong(digit.to(place.dtype), is_digit), value)
    # The digits after a wrong one are unknown: take the middle of the interval that they span.
    half_unit = at_first_wrong(torch.where(place == 0, one, place) / 2, is_digit)
    half_unit[:, 0] = torch.where(positions.in_world, half_unit[:, 0], 0.0)  # a frame index has no half unit
    sign = torch.where(tables.minus[predicted[positions.sign]], -1.0, 1.0)
    return sign * (value + half_unit)


def _with_next_token(positions: AnswerPositions) -> tuple[torch.Tensor, torch.Tensor]:
    """`digit` and `place_value` of the answer positions, with the token after every number as one more entry.

    Returns:
        ``[batch, MAX_NUMBERS, width + 1]`` int64 answer tokens, -1 for padding; and their float64 place values. The
        added one is a tenth of the last digit's place in a decimal number, and 0 after an integer.
    """
    index = torch.nn.functional.pad(positions.digit, (0, 1), value=-1)
    place = torch.nn.functional.pad(positions.place_value, (0, 1))
    length = (positions.digit >= 0).sum(-1, keepdim=True)
    last = (length - 1).clamp(min=0)
    has_point = ((index >= 0) & (place == 0)).any(-1, keepdim=True)
    # A sample without digit tokens has length 0 and gets no entry.
    next_index = torch.where(length > 0, index.gather(-1, last) + 1, -1)
    next_place = torch.where(has_point, place.gather(-1, last) / 10, 0.0)
    return index.scatter(-1, length, next_index), place.scatter(-1, length, next_place)


def has_numbers(positions: AnswerPositions) -> torch.Tensor:
    """``[batch]`` bool: the sample's answer has digit tokens (all of its numbers have, or none)."""
    return (positions.digit >= 0).flatten(1).any(-1)


def answer_boxes(numbers: torch.Tensor, in_world: torch.Tensor) -> torch.Tensor:
    """Boxes of grounding answers from their numbers.

    Args:
        numbers: ``[batch, MAX_NUMBERS]`` floating point.
        in_world: ``[batch]`` bool, the numbers are those of box format ``world``.

    Returns:
        ``[batch, 9]`` centre, size and ZXY angles, in the world or in the camera of the answer's frame. The size of a
        world box is its highest minus its lowest corner, so it may be negative.
    """
    low, high = numbers[:, :3], numbers[:, 3:6]
    between_corners = torch.cat([low / 2 + high / 2, high - low, torch.zeros_like(low)], dim=-1)
    return torch.where(in_world[:, None], between_corners, numbers[:, 1:])


def grounding_similarity(
    predicted: torch.Tensor, batch: Batch, tables: TokenTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU3D of teacher-forced boxes with the label's box, in world coordinates.

    A predicted box is in the world or in the camera of the predicted frame, by the sample's box format.

    Args:
        predicted: ``[answer tokens]`` int64, most likely token at every answer position.
        batch: labels, poses and target boxes.
        tables: digit and sign of every token of the vocabulary.

    Returns:
        s ``[batch]`` float64 in [0, 1]; and valid ``[batch]`` bool: the answer has a box with positive sizes and, for
        box format ``camera``, a frame of the sample. s is 0 for an invalid answer and for a sample without digit
        tokens.
    """
    positions = batch.answer_positions
    numbers = predicted_numbers(predicted, positions, tables)
    boxes = answer_boxes(numbers, positions.in_world)
    pose, exists = box_poses(batch.cam_to_world, numbers[:, 0].long(), positions.in_world)
    return _world_iou(boxes, pose, has_numbers(positions) & exists, batch.target_box)


def decoded_grounding_similarity(texts: Sequence[str], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU3D of decoded answers with the label's box; a sample's task parses its answer (`Task.parse`). On the CPU.

    Args:
        texts: decoded answer of every sample, without special tokens; only those of grounding samples are used.
        batch: poses and target boxes, on any device.

    Returns:
        s ``[batch]`` float64 in [0, 1]; and valid ``[batch]`` bool, see `grounding_similarity`. An answer that cannot
        be parsed is invalid. 0 and False for other kinds.
    """
    poses, target = batch.cam_to_world.cpu(), batch.target_box.cpu()
    # Padding poses are NaN.
    frame_counts = poses.isfinite().flatten(2).all(-1).sum(-1).tolist()
    frame = torch.zeros(len(target), dtype=torch.int64)
    boxes = torch.zeros(len(target), 9, dtype=torch.float64)
    parsed, in_world = torch.zeros(2, len(target), dtype=torch.bool)
    for index, (text, count) in enumerate(zip(texts, frame_counts, strict=True)):
        if batch.kinds[index] != "grounding":
            continue
        try:
            answer = TASKS.find(batch.tasks[index]).parse(text, count, batch.box_formats[index])
        except AnswerError:
            continue
        parsed[index] = True
        if isinstance(answer, WorldGrounding):
            in_world[index], boxes[index, :6] = True, torch.from_numpy(answer.box)
        else:
            frame[index], boxes[index] = answer.frame, torch.from_numpy(answer.box)
    pose, exists = box_poses(poses, frame, in_world)
    return _world_iou(boxes, pose, parsed & exists, target)


def predicted_texts(
    predicted: torch.Tensor, batch: Batch, decode: Callable[[list[int]], str], end_tokens: Collection[int] = ()
) -> list[str]:
    """Teacher-forced captions and short answers, as text.

    Every token is predicted from the label's tokens before it. A text ends at its first predicted end token.

    Args:
        predicted: ``[answer tokens]`` int64, most likely token at every answer position.
        batch: labels and kinds.
        decode: token ids -> text without special tokens.
        end_tokens: end tokens of greedy decoding besides the label's last token, the end of turn.

    Returns:
        One text per sample, ``""`` for grounding samples. Synchronizes with the device unless all are grounding.
    """
    texts = [""] * len(batch.kinds)
    if not has_text(batch):
        return texts
    positions = batch.answer_positions
    # One copy to the host for all three tensors.
    sample, label, guess = torch.stack((positions.sample, positions.label, predicted)).tolist()
    for index, kind in enumerate(batch.kinds):
        if kind == "grounding":
            continue
        own = [entry for entry, owner in enumerate(sample) if owner == index]
        if not own:  # every answer token is masked
            continue
        texts[index] = decode(cut_at_end([guess[entry] for entry in own], {label[own[-1]], *end_tokens}))
    return texts


def has_text(batch: Batch) -> bool:
    """Whether the batch has a caption or a short answer. A host value: no synchronization."""
    return any(kind != "grounding" for kind in batch.kinds)


def frame_poses(cam_to_world: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pose of one frame per sample; the identity if the sample does not have this frame.

    Args:
        cam_to_world: ``[batch, frames, 4, 4]``, NaN for frames that do not exist.
        frame: ``[batch]`` int64 frame indices, in range or not.

    Returns:
        ``[batch, 4, 4]`` poses, and ``[batch]`` bool: the frame exists.
    """
    frames = cam_to_world.shape[1]
    pose = cam_to_world[torch.arange(len(frame), device=frame.device), frame.clamp(0, frames - 1)]
    exists = (frame >= 0) & (frame < frames) & pose.isfinite().flatten(1).all(-1)
    identity = torch.eye(4, dtype=pose.dtype, device=pose.device)
    return torch.where(exists[:, None, None], pose, identity), exists


def box_poses(
    cam_to_world: torch.Tensor, frame: torch.Tensor, in_world: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform from the coordinates of every sample's box to the world: the pose of its frame, or the identity.

    Args:
        cam_to_world: ``[batch, frames, 4, 4]``, NaN for frames that do not exist.
        frame: ``[batch]`` int64 frame indices, in range or not; not used for a box in the world.
        in_world: ``[batch]`` bool, the box is in world coordinates.

    Returns:
        ``[batch, 4, 4]`` transforms, and ``[batch]`` bool: the box is in the world, or its frame exists.
    """
    # Frame -1 exists in no sample: its pose is the identity.
    pose, exists = frame_poses(cam_to_world, torch.where(in_world, -1, frame))
    return pose, exists | in_world


def center_size_rotation(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """World boxes ``[n, 9]`` -> centre ``[n, 3]``, size ``[n, 3]``, rotation ``[n, 3, 3]``."""
    return boxes[:, :3], boxes[:, 3:6], euler_angles_to_matrix_torch(boxes[:, 6:])


def _world_iou(
    boxes: torch.Tensor, pose: torch.Tensor, has_box: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU of answered boxes with world boxes; see `grounding_similarity` for the returned pair.

    Args:
        boxes: ``[batch, 9]`` float64.
        pose: ``[batch, 4, 4]`` transform from the coordinates of each box to the world.
        has_box: ``[batch]`` bool, False if the answer has no box, or one in a frame that does not exist.
        target: ``[batch, 9]``, in world coordinates.
    """
    valid = has_box & (boxes[:, 3:6] > 0).all(-1)
    iou = oriented_iou(*camera_to_world_torch(boxes, pose), *center_size_rotation(target))
    return torch.where(valid, iou, 0.0), valid
