"""Features -> Batch: right-padded for training, left-padded for generation. Everything the step reads is made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from w2r2_ds.data.eyes import vision_patches
from w2r2_ds.data.images import VGGT_PATCH
from w2r2_ds.data.processor import Features
from w2r2_ds.data.sample import Kind, Sample
from w2r2_ds.data.slots import NUMBERS
from w2r2_ds.geometry.cached import Cached
from w2r2_ds.models.tower import TowerInputs
from w2r2_ds.models.vlm import VisionSpec

Positions = Callable[..., torch.Tensor]
"""(input_ids, token_types, attention_mask, image grid or None, video grid or None) -> ``[3, batch, length]``."""


@dataclass(frozen=True)
class Visuals:
    """What both towers see of a batch; never nothing, so that every rank calls them in every step.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        pixel_values: ``[patches, values]`` float32.
        grid_thw: ``[images or videos, 3]`` int64.
        sizes: tokens of every image, or of every pair of frames of a video, in order.
        tower: what the vision tower would read off `grid_thw`.
        geometry_images: per sample with frames, in order, ``[frames, 3, height, width]`` float32 in [0, 1]; None where
            `cached_3d` has the features.
        ids: the ids of those samples.
        dummy: no sample has frames; this is one gray image or short video, whose tokens are in no sequence.
        cached_3d: per sample with frames, what the cache says about its geometry; empty without a cache.
        cached_2d: likewise about its 2D features. Then there are no `pixel_values`, but
        alone: per sample with frames, what the vision tower is given, sample by sample; None where it need not be, and
        spare: the dummy, for a rank that lacks fewer samples than another.
    """

    kind: str
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    sizes: tuple[int, ...]
    tower: TowerInputs
    geometry_images: tuple[torch.Tensor | None, ...]
    ids: tuple[str, ...] = ()
    dummy: bool = False
    cached_3d: tuple[Cached, ...] = ()
    cached_2d: tuple[Cached, ...] = ()
    alone: tuple[Visuals | None, ...] = ()
    spare: Visuals | None = None


@dataclass(frozen=True)
class Layout:
    """What the sequences of a batch are made of: groups of samples that share a prefix, each with a suffix of its own.

    Token i sees token j where j <= i, both are of one group, and j is in its prefix or in the suffix that i is in. A
    sample alone is a group without suffixes.

    Attributes:
        group: ``[sequences, length]`` int64, group of every token in its sequence; -1 for padding.
        suffix: ``[sequences, length]`` int64, 0 in a prefix, n in the n-th suffix of its group.
        spans: per sequence and group, on the host: begin, end of the prefix, end of every suffix.
    """

    group: torch.Tensor
    suffix: torch.Tensor
    spans: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class AnswerRows:
    """The rows (positions) whose next token is an answer token, over the whole batch, samples in order.

    Attributes:
        sample: ``[rows]`` int64, index of the sample in the batch.
        sequence: ``[rows]`` int64, index of the sequence that the sample is in.
        position: ``[rows]`` int64, position in it of the hidden state that predicts the label.
        label: ``[rows]`` int64, the token to be predicted.
        where: ``[rows]`` bool, the label says where: digits of frame and box; of captions and answers, every token.
        number: ``[batch, NUMBERS, width >= 1]`` int64 row of every digit and decimal point, -1 where there is none;
            -1 everywhere for a sample without number slots.
        place: ``[batch, NUMBERS, width]`` float64 unit of the digit, 0 for a decimal point and where there is none.
        lead: ``[batch, NUMBERS]`` int64 row of the token that carries the sign; 0 for a sample without number slots.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    label: torch.Tensor
    where: torch.Tensor
    number: torch.Tensor
    place: torch.Tensor
    lead: torch.Tensor


@dataclass(frozen=True)
class PromptRows:
    """The positions of the *what* tokens (of the description, in the prompt) of the whole batch, samples in order.

    Attributes:
        sample: ``[n]`` int64, index of the sample in the batch.
        sequence: ``[n]`` int64, index of the sequence that the sample is in.
        position: ``[n]`` int64, position in it of the token itself.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """The prompts of a training batch alone, padded on the left, for greedy decoding; fields as `Batch`'s."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        ids: sample ids.
        input_ids: ``[sequences, length]`` int64; a sample is a sequence.
        attention_mask: ``[sequences, length]`` int64, 1 for tokens.
        token_types: ``[sequences, length]`` int64, `mm_token_type_ids`.
        position_ids: ``[3, sequences, length]`` int64; None for generation, which makes its own.
        visuals: input of the towers.
        visual_tokens: ``[tokens]`` int64, sequence * length + position of every visual token, in the towers' order.
        layout: what every sequence is made of; None for generation.
        rows: answer rows; None for generation.
        cam_to_world: ``[batch, frames >= 1, 4, 4]`` float64, NaN where a sample has fewer frames.
        target_box: ``[batch, 9]`` float64 world boxes, NaN where a sample has none.
        what: positions of the description's tokens; None for generation.
        kinds: what every answer is, see `Sample.kind`.
        answers: every answer's text.
        prompts: the prompts alone, where the collator was told to make them.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    position_ids: torch.Tensor | None
    visuals: Visuals
    visual_tokens: torch.Tensor
    layout: Layout | None
    rows: AnswerRows | None
    cam_to_world: torch.Tensor
    target_box: torch.Tensor
    what: PromptRows | None
    kinds: tuple[Kind, ...]
    answers: tuple[str, ...]
    prompts: Prompts | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait."""
        return moved(self, device)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return _map(self, torch.Tensor.pin_memory)

    @property
    def answer_rows(self) -> AnswerRows:
        """The answer rows of a training batch."""
        assert self.rows is not None, "a batch for generation has no answer rows"
        return self.rows

    @property
    def what_rows(self) -> PromptRows:
        """The *what* positions of a training batch."""
        assert self.what is not None, "a batch for generation has no what rows"
        return self.what


def moved(value: Any, device: torch.device) -> Any:
    """A batch or a part of it on `device`; copies from pinned memory do not wait."""
    return _map(value, lambda tensor: tensor.to(device, non_blocking=True))


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
        vision: sizes of the vision tower, for the image of a batch without frames.
        with_prompts: also make `Batch.prompts`.
    """

    def __init__(
        self, pad_id: int, kind: str, positions: Positions | None, vision: VisionSpec, with_prompts: bool = False
    ) -> None:
        self.pad_id, self.kind, self.positions, self.with_prompts = pad_id, kind, positions, with_prompts
        self.vision, self.dummy = vision, dummy_visuals(kind, vision)

    def __call__(self, features: Sequence[Features]) -> Batch:
        left = self.positions is None
        tokens = self._padded(features, left)
        visuals = self._visuals(features)
        position_ids = None
        if self.positions is not None:
            grid = None if visuals.dummy else visuals.grid_thw
            grids = {"image": (grid, None), "video": (None, grid)}[self.kind]
            position_ids = self.positions(tokens.input_ids, tokens.token_types, tokens.attention_mask, *grids)
        samples = [f.sample for f in features]
        return Batch(
            ids=tuple(sample.id for sample in samples),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            token_types=tokens.token_types,
            position_ids=position_ids,
            visuals=visuals,
            visual_tokens=tokens.token_types.flatten().nonzero().squeeze(-1),
            layout=None if left else _one_by_one(features, tokens.attention_mask),
            rows=None if left else _answer_rows(features),
            cam_to_world=_poses(samples),
            target_box=_target_boxes(samples),
            what=None if left else _prompt_rows(features),
            kinds=tuple(sample.kind for sample in samples),
            answers=tuple(sample.answer for sample in samples),
            prompts=self._padded([_prompt(f) for f in features], left=True) if self.with_prompts else None,
        )

    def _padded(self, features: Sequence[Features], left: bool) -> Prompts:
        """Tokens of all sequences, padded to the longest."""
        return Prompts(
            input_ids=_pad([f.input_ids for f in features], self.pad_id, left),
            attention_mask=_pad([torch.ones_like(f.input_ids) for f in features], 0, left),
            token_types=_pad([f.token_types for f in features], 0, left),
        )

    def _visuals(self, features: Sequence[Features]) -> Visuals:
        """Visuals of the samples that have some, or the dummy."""
        seen = [f for f in features if f.sample.frames]
        if not seen:
            return self.dummy
        cached_3d = tuple(f.cached_3d for f in seen if f.cached_3d is not None)
        cached_2d = tuple(f.cached_2d for f in seen if f.cached_2d is not None)
        grid_thw = torch.cat([f.grid_thw for f in seen])
        # With cached 2D features the tower is given sample by sample what it lacks.
        patches = torch.cat([f.pixel_values[:0] if cached_2d else f.pixel_values for f in seen])
        visuals = dataclasses.replace(
            tower_input(self.kind, patches, grid_thw, self.vision),
            geometry_images=tuple(f.geometry_images for f in seen),
            ids=tuple(f.sample.id for f in seen),
            cached_3d=cached_3d,
            cached_2d=cached_2d,
        )
        if not cached_2d:
            return visuals
        alone = tuple(
            tower_input(self.kind, f.pixel_values, f.grid_thw, self.vision) if len(f.pixel_values) else None
            for f in seen
        )
        return dataclasses.replace(visuals, alone=alone, spare=self.dummy)


def tower_input(kind: str, patches: torch.Tensor, grid_thw: torch.Tensor, vision: VisionSpec) -> Visuals:
    """What the vision tower is given of patches and their grids; no geometry, nobody's."""
    sizes = token_counts(grid_thw, vision.merge_size)
    tower = TowerInputs.of(grid_thw, vision.merge_size, vision.window_size, vision.patch_size)
    return Visuals(kind, patches, grid_thw, sizes, tower, ())


def dummy_visuals(kind: str, vision: VisionSpec) -> Visuals:
    """One gray image of two by two merged patches, or a video of as many frames as make one row of tokens."""
    frames = vision.temporal_patch_size if kind == "video" else 1
    side = 2 * vision.merge_size
    # Both towers' patches differ in size, their grids do not.
    seen, geometry = (
        np.full((frames, 3, side * size, side * size), 0.5, dtype=np.float32)
        for size in (vision.patch_size, VGGT_PATCH)
    )
    visuals = tower_input(kind, *vision_patches(seen, vision, kind), vision)
    return dataclasses.replace(visuals, geometry_images=(torch.from_numpy(geometry),), dummy=True)


def token_counts(grid_thw: torch.Tensor, merge_size: int) -> tuple[int, ...]:
    """Tokens of every image, or of every pair of frames, of ``[images or videos, 3]`` patch grids."""
    return tuple(height * width // merge_size**2 for time, height, width in grid_thw.tolist() for _ in range(time))


def _prompt(feature: Features) -> Features:
    """The same sample without its answer."""
    count = len(feature.input_ids) - feature.answer_tokens
    return dataclasses.replace(
        feature, input_ids=feature.input_ids[:count], token_types=feature.token_types[:count], answer_tokens=0
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
    count = max([1, *(len(sample.frames) for sample in samples)])
    result = torch.full((len(samples), count, 4, 4), torch.nan, dtype=torch.float64)
    for index, sample in enumerate(samples):
        result[index, : len(sample.frames)] = torch.from_numpy(sample.cam_to_world)
    return result


def _target_boxes(samples: Sequence[Sample]) -> torch.Tensor:
    """``[batch, 9]`` float64, NaN for a sample without a target."""
    nothing = np.full(9, np.nan)
    return torch.from_numpy(np.stack([nothing if s.target is None else s.target.box for s in samples]))


def _one_by_one(features: Sequence[Features], attention_mask: torch.Tensor) -> Layout:
    """Every sample is a sequence and a group of its own."""
    spans = tuple(((0, len(f.input_ids)),) for f in features)
    return Layout(attention_mask - 1, torch.zeros_like(attention_mask), spans)


def _prompt_rows(features: Sequence[Features]) -> PromptRows:
    """Where the description's tokens are; a sequence begins at position 0 of its row (padding is on the right)."""
    positions = [f.what.nonzero().squeeze(-1) for f in features]
    sample = [torch.full_like(position, index) for index, position in enumerate(positions)]
    return PromptRows(torch.cat(sample), torch.cat(sample), torch.cat(positions))


def _answer_rows(features: Sequence[Features]) -> AnswerRows:
    """Flatten the answer positions of the batch and point the number slots at them."""
    slots = [f.slots for f in features if f.slots is not None]
    assert len(slots) == len(features), "training features carry answers"
    width = max([1, *(len(tokens) for slot in slots for tokens in slot.tokens)])
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
        if slot.digits:
            lead[index] = torch.from_numpy(slot.lead) + first_row
        for i, (tokens, places) in enumerate(zip(slot.tokens, slot.places, strict=True)):
            number[index, i, : len(tokens)] = torch.tensor(tokens) + first_row
            place[index, i, : len(tokens)] = torch.tensor(places, dtype=torch.float64)
        first_row += count
    owner = torch.cat(sample)
    return AnswerRows(owner, owner, torch.cat(position), torch.cat(label), torch.cat(where), number, place, lead)
