"""Features -> Batch: right-padded for training, left-padded for generation. Everything the step reads is made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from w2r2_ds.data.processor import Features
from w2r2_ds.data.sample import Sample
from w2r2_ds.data.slots import NUMBERS

Positions = Callable[..., torch.Tensor]
"""(input_ids, token_types, attention_mask, image grid or None, video grid or None) -> ``[3, batch, length]``."""


@dataclass(frozen=True)
class Visuals:
    """What both towers see of a batch.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        pixel_values: ``[patches, values]`` float32.
        grid_thw: ``[images or videos, 3]`` int64.
        geometry_images: per sample ``[frames, 3, height, width]`` float32 in [0, 1].
    """

    kind: str
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    geometry_images: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AnswerRows:
    """The rows (positions) whose next token is an answer token, over the whole batch, samples in order.

    Attributes:
        sample: ``[rows]`` int64, index of the sample in the batch.
        position: ``[rows]`` int64, position of the hidden state that predicts the label.
        label: ``[rows]`` int64, the token to be predicted.
        where: ``[rows]`` bool, the label is a digit of frame or box.
        number: ``[batch, NUMBERS, width]`` int64 row of every digit and decimal point, -1 where there is none.
        place: ``[batch, NUMBERS, width]`` float64 unit of the digit, 0 for a decimal point and where there is none.
        lead: ``[batch, NUMBERS]`` int64 row of the token that carries the sign.
    """

    sample: torch.Tensor
    position: torch.Tensor
    label: torch.Tensor
    where: torch.Tensor
    number: torch.Tensor
    place: torch.Tensor
    lead: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        ids: sample ids.
        input_ids: ``[batch, length]`` int64.
        attention_mask: ``[batch, length]`` int64, 1 for tokens.
        token_types: ``[batch, length]`` int64, `mm_token_type_ids`.
        position_ids: ``[3, batch, length]`` int64; None for generation, which makes its own.
        visuals: input of the towers.
        rows: answer rows; None for generation.
        cam_to_world: ``[batch, frames, 4, 4]`` float64, NaN where a sample has fewer frames.
        target_box: ``[batch, 9]`` float64 world boxes.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    position_ids: torch.Tensor | None
    visuals: Visuals
    rows: AnswerRows | None
    cam_to_world: torch.Tensor
    target_box: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return _map(self, torch.Tensor.pin_memory)

    @property
    def answer_rows(self) -> AnswerRows:
        """The answer rows of a training batch."""
        assert self.rows is not None, "a batch for generation has no answer rows"
        return self.rows


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to every tensor of nested dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _map(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


class Collator:
    """Make a `Batch` of `Features`.

    Args:
        pad_id: padding token.
        kind: ``"image"`` or ``"video"``.
        positions: multimodal positions, computed here so that the GPU never waits for them; None pads on the left,
            for generation.
    """

    def __init__(self, pad_id: int, kind: str, positions: Positions | None) -> None:
        self.pad_id, self.kind, self.positions = pad_id, kind, positions

    def __call__(self, features: Sequence[Features]) -> Batch:
        left = self.positions is None
        input_ids = _pad([f.input_ids for f in features], self.pad_id, left)
        attention_mask = _pad([torch.ones_like(f.input_ids) for f in features], 0, left)
        token_types = _pad([f.token_types for f in features], 0, left)
        visuals = Visuals(
            kind=self.kind,
            pixel_values=torch.cat([f.pixel_values for f in features]),
            grid_thw=torch.cat([f.grid_thw for f in features]),
            geometry_images=tuple(f.geometry_images for f in features),
        )
        position_ids = None
        if self.positions is not None:
            grids = {"image": (visuals.grid_thw, None), "video": (None, visuals.grid_thw)}[self.kind]
            position_ids = self.positions(input_ids, token_types, attention_mask, *grids)
        samples = [f.sample for f in features]
        return Batch(
            ids=tuple(sample.id for sample in samples),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_types=token_types,
            position_ids=position_ids,
            visuals=visuals,
            rows=None if left else _answer_rows(features),
            cam_to_world=_poses(samples),
            target_box=torch.from_numpy(np.stack([sample.target.box for sample in samples])),
        )


def _pad(rows: Sequence[torch.Tensor], value: int, left: bool) -> torch.Tensor:
    """``[batch, longest]``, padded with `value`."""
    length = max(len(row) for row in rows)
    result = torch.full((len(rows), length), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        begin = length - len(row) if left else 0
        result[index, begin : begin + len(row)] = row
    return result


def _poses(samples: Sequence[Sample]) -> torch.Tensor:
    """``[batch, frames, 4, 4]``; samples with fewer frames are filled with NaN, so that naming one has IoU 0."""
    count = max(len(sample.frames) for sample in samples)
    result = torch.full((len(samples), count, 4, 4), torch.nan, dtype=torch.float64)
    for index, sample in enumerate(samples):
        result[index, : len(sample.frames)] = torch.from_numpy(sample.cam_to_world)
    return result


def _answer_rows(features: Sequence[Features]) -> AnswerRows:
    """Flatten the answer positions of the batch and point the number slots at them."""
    slots = [f.slots for f in features if f.slots is not None]
    assert len(slots) == len(features), "training features carry answers"
    width = max(len(tokens) for slot in slots for tokens in slot.tokens)
    number = torch.full((len(features), NUMBERS, width), -1, dtype=torch.int64)
    place = torch.zeros((len(features), NUMBERS, width), dtype=torch.float64)
    lead = torch.zeros((len(features), NUMBERS), dtype=torch.int64)
    sample, position, label, where = [], [], [], []
    first_row = 0
    for index, (feature, slot) in enumerate(zip(features, slots, strict=True)):
        length, count = len(feature.input_ids), feature.answer_tokens
        sample.append(torch.full((count,), index, dtype=torch.int64))
        position.append(torch.arange(length - count - 1, length - 1))
        label.append(feature.input_ids[length - count :])
        where.append(torch.from_numpy(slot.where))
        lead[index] = torch.from_numpy(slot.lead) + first_row
        for i, (tokens, places) in enumerate(zip(slot.tokens, slot.places, strict=True)):
            number[index, i, : len(tokens)] = torch.tensor(tokens) + first_row
            place[index, i, : len(tokens)] = torch.tensor(places, dtype=torch.float64)
        first_row += count
    return AnswerRows(torch.cat(sample), torch.cat(position), torch.cat(label), torch.cat(where), number, place, lead)
