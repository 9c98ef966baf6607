"""`Batch`: one micro-batch of token ids, visual inputs and labels, built by the collator for model and objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from w2r2_ds.features.lookup import CacheLookup
from w2r2_ds.types.sample import BoxFormat, Kind
from w2r2_ds.types.vision import VisionSpec

T = TypeVar("T")


@dataclass(frozen=True)
class TowerInputs:
    """Inputs of the vision tower that are derived from the patch grids (`grid_thw`); each VLM family has a subclass.

    The collator computes them on the CPU: on the GPU, deriving them would synchronize host and device a few times per
    image.
    """


@dataclass(frozen=True)
class Visuals:
    """Inputs of the vision tower and the geometry encoder for a batch.

    A *frame set* is an ordered set of frames: one per sample with frames, or one per group of packed samples that share
    it. If no sample has frames, the inputs are a dummy, so that all ranks call both encoders in every step (under
    ZeRO-3 each call gathers weights).

    Attributes:
        kind: ``"image"`` or ``"video"``.
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width).
        sizes: number of tokens of every image, or of every temporal patch of a video, in order.
        tower: inputs of the vision tower that are derived from `grid_thw`.
        vision: patch sizes and normalisation of the vision tower.
        tower_frames: per frame set, ``[frames, 3, height, width]`` uint8, not cropped to whole tokens; empty with a
            cache of 2D features, where `uncached` has them. The frames become float pixel values on the device.
        geometry_frames: per frame set, the frames for the geometry encoder, usually the same tensors as `tower_frames`;
            for an encoder of point maps, ``[frames, rows, columns, points, 3]`` float32 in place of images. None if
            `cached_3d` has the set's features.
        scale_reference: per frame set, metric lengths for the scale hint, float32, metres. With hint ``depth``,
            ``[frames, rows, columns]`` depth at the centre of every patch of the geometry encoder, NaN where none was
            measured; with ``poses``, ``[frames, 3]`` camera centres in the world. None without a scale hint, or if
            `cached_3d` has the features. Empty for inputs of the vision tower only.
        ids: per frame set, the id of its (first) sample.
        dummy: True for the dummy, a gray image or short video whose tokens are in no sequence.
        cached_3d: per frame set, the cache lookup of its geometry features; empty without a cache.
        cached_2d: per frame set, the cache lookup of its 2D features; empty without a cache of 2D features.
        uncached: with a cache of 2D features, per frame set, the tower's inputs if the cache lacks the set's features,
            else None; empty without such a cache.
        filler: with a cache of 2D features, the dummy. A rank with fewer uncached frame sets than another calls the
            tower on it, until all ranks have made the same number of calls.
    """

    kind: str
    grid_thw: torch.Tensor
    sizes: tuple[int, ...]
    tower: TowerInputs
    vision: VisionSpec
    tower_frames: tuple[torch.Tensor, ...]
    geometry_frames: tuple[torch.Tensor | None, ...]
    scale_reference: tuple[torch.Tensor | None, ...] = ()
    ids: tuple[str, ...] = ()
    dummy: bool = False
    cached_3d: tuple[CacheLookup, ...] = ()
    cached_2d: tuple[CacheLookup, ...] = ()
    uncached: tuple[Visuals | None, ...] = ()
    filler: Visuals | None = None


class Tokens(NamedTuple):
    """Tokens of all sequences; see the fields of the same names in `Batch`."""

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
        order: indices into `Visuals.sizes` of the images or temporal patches of every prompt, one prompt after the
            other.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    grid_thw: torch.Tensor
    order: tuple[int, ...]


@dataclass(frozen=True)
class AnchorInputs:
    """What turns the visual token with the highest attention into a box, without geometry features.

    Attributes:
        frame: ``[visual tokens]`` int64, index of the token's frame among the frames of its frame set.
        ray: ``[visual tokens, 3]`` float64, point at depth 1 on the token's viewing ray, in the camera of its frame.
        depth: ``[batch]`` float64, typical depth of a target in metres; NaN for samples without a box to compare with.
        size: ``[batch, 3]`` float64, typical size of a target of the sample's class, metres; NaN for the same samples.
    """

    frame: torch.Tensor
    ray: torch.Tensor
    depth: torch.Tensor
    size: torch.Tensor


@dataclass(frozen=True)
class OtherGeometry:
    """The geometry of another scene for every frame set of a batch, for push terms that contrast with it.

    Attributes:
        token: ``[visual tokens]`` int64, index of the visual token at the same place in the frame set of another scene;
            -1 if the batch has no such frame set with the same patch grids.
        exists: ``[batch]`` bool, there is one for the sample; False without frames.
    """

    token: torch.Tensor
    exists: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``sequences`` equals ``batch`` (the number of samples), or is 1 if the samples are packed.

    A batch for training has all fields. A batch for generation has None in the Optional fields; the properties
    `answer_positions` and `description_positions` are for training batches only.

    Attributes:
        ids: sample ids.
        tasks: name of the task of every sample.
        input_ids: ``[sequences, length]`` int64.
        attention_mask: ``[sequences, length]`` int64, 1 for tokens, 0 for padding.
        token_types: ``[sequences, length]`` int64, `mm_token_type_ids`: 0 text, 1 image, 2 video.
        position_ids: ``[axes, sequences, length]`` int64; None for generation, where the model computes them.
        visuals: inputs of both encoders.
        visual_tokens: ``[visual tokens]`` int64, ``sequence * length + position`` of every visual token, in the
            encoders' order.
        frame_set_of_token: ``[visual tokens]`` int64, index of the frame set of every visual token.
        frame_set_of_sample: ``[batch]`` int64, index of the frame set of every sample; -1 without frames.
        layout: groups of the sequences; None for generation.
        optional_answer_positions: labels and their positions; None for generation.
        optional_description_positions: positions of the tokens of the descriptions; None for generation.
        cam_to_world: ``[batch, frames >= 1, 4, 4]`` float64 camera poses; NaN for missing frames.
        target_box: ``[batch, 9]`` float64 world boxes; NaN for a sample without a target.
        kinds: kind of every answer, see `Sample.kind`.
        box_formats: box format of every answer, see `Sample.box_format`.
        answers: text of every answer.
        prompts: prompts without answers, to decode answers during training; None if the collator does not make them.
        anchors: rays of the visual tokens, for attention anchors; None if the collator does not make them.
        other_geometry: visual tokens of other scenes; None for generation.
    """

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    position_ids: torch.Tensor | None
    visuals: Visuals
    visual_tokens: torch.Tensor
    frame_set_of_token: torch.Tensor
    frame_set_of_sample: torch.Tensor
    layout: Layout | None
    optional_answer_positions: AnswerPositions | None
    optional_description_positions: DescriptionPositions | None
    cam_to_world: torch.Tensor
    target_box: torch.Tensor
    kinds: tuple[Kind, ...]
    box_formats: tuple[BoxFormat, ...]
    answers: tuple[str, ...]
    prompts: Prompts | None = None
    anchors: AnchorInputs | None = None
    other_geometry: OtherGeometry | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory are asynchronous."""
        return to_device(self, device)

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the DataLoader calls this method with ``pin_memory=True``."""
        return map_tensors(self, torch.Tensor.pin_memory)

    @property
    def answer_positions(self) -> AnswerPositions:
        """Labels and their positions; for training batches only."""
        assert self.optional_answer_positions is not None, "a batch for generation has no answer positions"
        return self.optional_answer_positions

    @property
    def description_positions(self) -> DescriptionPositions:
        """Positions of the tokens of the descriptions; for training batches only."""
        assert self.optional_description_positions is not None, "a batch for generation has no description positions"
        return self.optional_description_positions


def to_device(value: T, device: torch.device) -> T:
    """A batch, or a part of it, on `device`; copies from pinned memory are asynchronous."""
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(value: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """Apply `function` to every tensor of nested dataclasses and tuples; other values stay as they are.

    It is called once for a tensor object that occurs several times, such as the frames that both encoders share.
    """
    results: dict[int, torch.Tensor] = {}

    def apply(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            if id(part) not in results:
                results[id(part)] = function(part)
            return results[id(part)]
        if isinstance(part, tuple):
            return tuple(apply(item) for item in part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            names = [field.name for field in dataclasses.fields(part)]
            return type(part)(**{name: apply(getattr(part, name)) for name in names})
        return part

    result: T = apply(value)
    return result


@dataclass(frozen=True)
class Layout:
    """Groups of samples in the sequences of a batch; a group is a shared prefix and one suffix per sample.

    Token i attends to token j if j <= i, both are in the same group, and j is in the group's prefix or in the same
    suffix as i. A group with one sample is all prefix.

    Attributes:
        group: ``[sequences, length]`` int64, index of every token's group in its sequence; -1 for padding.
        suffix: ``[sequences, length]`` int64, 0 for a token of a prefix, n for a token of the n-th suffix of its group.
        spans: ``spans[sequence][group]``, as Python integers: begin and end of the prefix, then the end of every
            suffix.
    """

    group: torch.Tensor
    suffix: torch.Tensor
    spans: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class AnswerPositions:
    """Labels of a batch and the positions whose hidden states predict them.

    The first five fields have one entry per *answer token*: the tokens of the answers, each with its end of turn,
    samples in order. `digit` and `sign` index into these entries. They and `place_value` have one entry per sample and
    number; a grounding answer has the numbers of its box format, padded to ``MAX_NUMBERS`` (``data/answer_tokens.py``),
    so that a batch may mix box formats.

    The token at position ``p`` of a sequence is predicted at ``p - 1``. Labels are shifted here, not in the loss, so
    that the LM head is applied to these positions only.

    Attributes:
        sample: ``[answer tokens]`` int64, index of the sample in the batch.
        sequence: ``[answer tokens]`` int64, index of the sequence.
        position: ``[answer tokens]`` int64, position in the sequence whose hidden state predicts the label.
        label: ``[answer tokens]`` int64, id of the token to be predicted.
        where: ``[answer tokens]`` bool, *where* tokens: digits of the numbers in a grounding answer; in a caption or a
            short answer, all tokens but the end of turn.
        digit: ``[batch, MAX_NUMBERS, width]`` int64, width >= 1: entry of every digit and decimal point of a number; -1
            for padding, and everywhere for a sample without digit tokens.
        place_value: ``[batch, MAX_NUMBERS, width]`` float64, place value of the digit (10, 1, 0.1, ...); 0 for a
            decimal point and for padding.
        sign: ``[batch, MAX_NUMBERS]`` int64, entry of the token that carries the sign; 0 for padding and without digit
            tokens.
        in_world: ``[batch]`` bool, the numbers are those of box format ``world``.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    label: torch.Tensor
    where: torch.Tensor
    digit: torch.Tensor
    place_value: torch.Tensor
    sign: torch.Tensor
    in_world: torch.Tensor


@dataclass(frozen=True)
class DescriptionPositions:
    """Positions of the *what* tokens (the description in the prompt) of a batch, samples in order.

    Attributes:
        sample: ``[what tokens]`` int64, index of the sample in the batch.
        sequence: ``[what tokens]`` int64, index of the sequence.
        position: ``[what tokens]`` int64, position of the token in the sequence.
    """

    sample: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
