"""`Batch`: one micro-batch of tokens, visual inputs and labels, as the collator makes it and the model reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from w2r2_ds.features.lookup import CacheLookup
from w2r2_ds.types.sample import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class TowerInputs:
    """Inputs of the vision tower that follow from the patch grids; each VLM family has a subclass.

    Made on the CPU by the collator. Derived from `grid_thw` on the GPU, they would synchronize host and device a few
    times per image.
    """


@dataclass(frozen=True)
class Visuals:
    """Inputs of the vision tower and the geometry encoder for a batch.

    A *frame set* is an ordered set of frames: one per sample with frames, or one per group of packed samples that share
    it. If no sample has frames, the inputs are a dummy, so that all ranks call both encoders in every step (under
    ZeRO-3 each call gathers weights).

    Attributes:
        kind: ``"image"`` or ``"video"``.
        pixel_values: ``[patches, values]`` float32; no patches with a cache of 2D features, see `uncached`.
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width).
        sizes: number of tokens of every image, or of every temporal patch of a video, in order.
        tower: inputs of the vision tower that follow from `grid_thw`.
        geometry_images: per frame set, ``[frames, 3, height, width]`` float32 in [0, 1]; None if `cached_3d` has its
            features.
        ids: per frame set, the id of its (first) sample.
        dummy: True for the dummy, a gray image or short video whose tokens are in no sequence.
        cached_3d: per frame set, the cache lookup of its geometry features; empty without a cache.
        cached_2d: per frame set, the cache lookup of its 2D features; empty without a cache of 2D features.
        uncached: with `cached_2d`, per frame set, the tower's inputs if the cache lacks its features, else None.
        filler: with `cached_2d`, the dummy, for the additional calls of a rank with fewer uncached frame sets than
            another.
    """

    kind: str
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    sizes: tuple[int, ...]
    tower: TowerInputs
    geometry_images: tuple[torch.Tensor | None, ...]
    ids: tuple[str, ...] = ()
    dummy: bool = False
    cached_3d: tuple[CacheLookup, ...] = ()
    cached_2d: tuple[CacheLookup, ...] = ()
    uncached: tuple[Visuals | None, ...] = ()
    filler: Visuals | None = None


class Tokens(NamedTuple):
    """Tokens of all sequences: fields of `Batch`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of a training batch without answers, padded on the left, one sequence per sample; for greedy decoding.

    Attributes:
        input_ids: ``[batch, length]`` int64.
        attention_mask: ``[batch, length]`` int64, 1 for tokens, 0 for padding.
        token_types: ``[batch, length]`` int64, `mm_token_type_ids`.
        grid_thw: ``[images or videos, 3]`` int64 patch grids of all prompts; frames that samples share are repeated.
        order: indices into `Visuals.sizes` of the prompts' visual tokens, one prompt after the other.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    grid_thw: torch.Tensor
    order: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``sequences`` equals ``batch`` (the number of samples), or is 1 if the samples are packed.

    Attributes:
        ids: sample ids.
        tasks: name of the task of every sample.
        input_ids: ``[sequences, length]`` int64.
        attention_mask: ``[sequences, length]`` int64, 1 for tokens, 0 for padding.
        token_types: ``[sequences, length]`` int64, `mm_token_type_ids`: 0 text, 1 image, 2 video.
        position_ids: ``[axes, sequences, length]`` int64; None for generation, where the model makes them.
        visuals: inputs of both encoders.
        visual_tokens: ``[tokens]`` int64, ``sequence * length + position`` of every visual token, in the encoders'
            order.
        token_set: ``[tokens]`` int64, index of the frame set of every visual token.
        frame_set: ``[batch]`` int64, index of the frame set of every sample; -1 without frames.
        layout: groups of the sequences; None for generation.
        answer: labels and their positions; None for generation.
        cam_to_world: ``[batch, frames >= 1, 4, 4]`` float64 camera poses; NaN for missing frames.
        target_box: ``[batch, 9]`` float64 world boxes; NaN for a sample without a target.
        description: positions of the description's tokens; None for generation.
        kinds: kind of every answer, see `Sample.kind`.
        answers: text of every answer.
        prompts: prompts without answers; None if the collator does not make them.
    """

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    position_ids: torch.Tensor | None
    visuals: Visuals
    visual_tokens: torch.Tensor
    token_set: torch.Tensor
    frame_set: torch.Tensor
    layout: Layout | None
    answer: AnswerPositions | None
    cam_to_world: torch.Tensor
    target_box: torch.Tensor
    description: DescriptionPositions | None
    kinds: tuple[Kind, ...]
    answers: tuple[str, ...]
    prompts: Prompts | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory are asynchronous."""
        return moved(self, device)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader."""
        return _map(self, torch.Tensor.pin_memory)

    @property
    def answer_positions(self) -> AnswerPositions:
        """`answer` of a training batch."""
        assert self.answer is not None, "a batch for generation has no answer positions"
        return self.answer

    @property
    def description_positions(self) -> DescriptionPositions:
        """`description` of a training batch."""
        assert self.description is not None, "a batch for generation has no description positions"
        return self.description


def moved(value: T, device: torch.device) -> T:
    """A batch or a part of it on `device`; copies from pinned memory are asynchronous."""
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


@dataclass(frozen=True)
class Layout:
    """Groups of a batch's sequences; a group is a shared prefix and one suffix per sample.

    Token i attends to token j if j <= i, both are in the same group, and j is in the group's prefix or in the same
    suffix as i. A group with one sample is all prefix.

    Attributes:
        group: ``[sequences, length]`` int64, index of every token's group in its sequence; -1 for padding.
        suffix: ``[sequences, length]`` int64, 0 for a token of a prefix, n for one of the n-th suffix of its group.
        spans: per sequence and group, as Python integers: begin and end of the prefix, end of every suffix.
    """

    group: torch.Tensor
    suffix: torch.Tensor
    spans: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class AnswerPositions:
    """Labels of a batch and the positions whose hidden states predict them; ``answers`` entries, samples in order.

    The label at position ``p`` of a sequence is predicted at ``p - 1``: labels are shifted here, not in the loss, so
    that the head is applied to these positions only.

    Attributes:
        sample: ``[answers]`` int64, index of the sample in the batch.
        sequence: ``[answers]`` int64, index of the sequence.
        position: ``[answers]`` int64, position in the sequence whose hidden state predicts the label.
        label: ``[answers]`` int64, id of the token to be predicted.
        where: ``[answers]`` bool, *where* tokens: digits of frame index and box in a grounding answer; in a caption or
            a short answer, all tokens but the end of turn.
        digit: ``[batch, NUMBERS, width]`` int64, width >= 1: the entry of every digit and decimal point of a number;
            -1 for padding, and everywhere for a sample without digit tokens.
        place_value: ``[batch, NUMBERS, width]`` float64, place value of the digit (10, 1, 0.1, ...); 0 for a decimal
            point and for padding.
        sign: ``[batch, NUMBERS]`` int64, the entry of the token that carries the sign; 0 without digit tokens.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    label: torch.Tensor
    where: torch.Tensor
    digit: torch.Tensor
    place_value: torch.Tensor
    sign: torch.Tensor


@dataclass(frozen=True)
class DescriptionPositions:
    """Positions of the *what* tokens (the description in the prompt) of a batch, samples in order.

    Attributes:
        sample: ``[tokens]`` int64, index of the sample in the batch.
        sequence: ``[tokens]`` int64, index of the sequence.
        position: ``[tokens]`` int64, position of the token in the sequence.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
