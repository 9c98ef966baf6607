"""One micro-batch as the model and the training step read it: tokens, visual inputs, answer positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from w2r2_ds.features.lookup import Cached
from w2r2_ds.types.sample import Kind


@dataclass(frozen=True)
class TowerInputs:
    """Inputs of the vision tower that follow from the patch grids, built on the host; each VLM family has a subclass.

    Computing them from grids on the device would make the host wait, a few times per image.
    """


@dataclass(frozen=True)
class Visuals:
    """What both towers see of a batch; never nothing, so that every rank calls them in every step.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        pixel_values: ``[patches, values]`` float32.
        grid_thw: ``[images or videos, 3]`` int64.
        sizes: tokens of every image, or of every pair of frames of a video, in order.
        tower: what the vision tower would read off `grid_thw`.
        geometry_images: per set of frames, in order, ``[frames, 3, height, width]`` float32 in [0, 1]; None where
            `cached_3d` has the features. A sample with frames has a set of its own, or packed samples share one.
        ids: per set, the id of the (first) sample that sees it.
        dummy: no sample has frames; this is one gray image or short video, whose tokens are in no sequence.
        cached_3d: per set, the result of the cache lookup of its geometry; empty without a cache.
        cached_2d: per set, the cache entry of its 2D features. Then there are no `pixel_values`, but
        alone: per set, what the vision tower is given, set by set; None where it need not be, and
        spare: the dummy, for a rank that lacks fewer sets than another.
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


class Tokens(NamedTuple):
    """Tokens of all sequences; fields as `Batch`'s."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """The prompts of a training batch alone, padded on the left, for greedy decoding; no two share a sequence.

    Attributes:
        input_ids, attention_mask, token_types: ``[batch, length]`` int64, as `Batch`'s.
        grid_thw: ``[images or videos, 3]`` int64, of all prompts.
        order: entries of `Visuals.sizes` that the prompts contain, one after the other; entries may repeat.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    grid_thw: torch.Tensor
    order: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        ids: sample ids.
        tasks: name of the task of every sample.
        input_ids: ``[sequences, length]`` int64; a sample is a sequence, or all are packed into one.
        attention_mask: ``[sequences, length]`` int64, 1 for tokens.
        token_types: ``[sequences, length]`` int64, `mm_token_type_ids`.
        position_ids: ``[3, sequences, length]`` int64; None for generation, which makes its own.
        visuals: input of the towers.
        visual_tokens: ``[tokens]`` int64, sequence * length + position of every visual token, in the towers' order.
        token_set: ``[tokens]`` int64, which of the visuals' sets of frames each of them is of.
        frame_set: ``[batch]`` int64, which of these sets a sample sees; -1 for a sample without frames.
        layout: what every sequence is made of; None for generation.
        answer: positions of the answer tokens; None for generation.
        cam_to_world: ``[batch, frames >= 1, 4, 4]`` float64, NaN where a sample has fewer frames.
        target_box: ``[batch, 9]`` float64 world boxes, NaN where a sample has none.
        description: positions of the description's tokens; None for generation.
        kinds: what every answer is, see `Sample.kind`.
        answers: every answer's text.
        prompts: the prompts alone, where the collator was told to make them.
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
        """The batch on `device`; copies from pinned memory do not wait."""
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
