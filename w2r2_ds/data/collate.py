"""Features -> Batch: right-padded for training, left-padded for generation. Everything the step reads is made here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from w2r2_ds.data.eyes import vision_patches
from w2r2_ds.data.images import VGGT_PATCH
from w2r2_ds.data.packing import Group, Grouping, Layout, alone, in_one_sequence, joined, joined_positions, one_by_one
from w2r2_ds.data.processor import Features
from w2r2_ds.data.rows import AnswerRows, PromptRows, answer_rows, prompt_rows
from w2r2_ds.data.sample import Kind, Sample
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
        geometry_images: per set of frames, in order, ``[frames, 3, height, width]`` float32 in [0, 1]; None where
            `cached_3d` has the features. A sample with frames has a set of its own, or packed samples share one.
        ids: per set, the id of the (first) sample that sees it.
        dummy: no sample has frames; this is one gray image or short video, whose tokens are in no sequence.
        cached_3d: per set, what the cache says about its geometry; empty without a cache.
        cached_2d: likewise about its 2D features. Then there are no `pixel_values`, but
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
        order: which of the entries of `Visuals.sizes` the prompts see, one after the other.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_types: torch.Tensor
    grid_thw: torch.Tensor
    order: tuple[int, ...]

    def seen(self, visuals: Visuals, visual: Any) -> tuple[Visuals, Any]:
        """Visuals and a vision tower's output of the batch, as the prompts see them, which share no images."""
        if visuals.dummy:
            return visuals, visual
        repeated = copy.copy(visual)
        repeated.pooler_output = tuple(visual.pooler_output[entry] for entry in self.order)
        return dataclasses.replace(visuals, grid_thw=self.grid_thw), repeated


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        ids: sample ids.
        input_ids: ``[sequences, length]`` int64; a sample is a sequence, or all are packed into one.
        attention_mask: ``[sequences, length]`` int64, 1 for tokens.
        token_types: ``[sequences, length]`` int64, `mm_token_type_ids`.
        position_ids: ``[3, sequences, length]`` int64; None for generation, which makes its own.
        visuals: input of the towers.
        visual_tokens: ``[tokens]`` int64, sequence * length + position of every visual token, in the towers' order.
        token_set: ``[tokens]`` int64, which of the visuals' sets of frames each of them is of.
        frame_set: ``[batch]`` int64, which of these sets a sample sees; -1 for a sample without frames.
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
    token_set: torch.Tensor
    frame_set: torch.Tensor
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
        grouping: which samples share frames, packed into one sequence; None makes a padded sequence of each.
    """

    def __init__(
        self,
        pad_id: int,
        kind: str,
        positions: Positions | None,
        vision: VisionSpec,
        with_prompts: bool = False,
        grouping: Grouping | None = None,
    ) -> None:
        assert grouping is None or positions is not None, "prompts for generation are not packed"
        self.pad_id, self.kind, self.positions, self.with_prompts = pad_id, kind, positions, with_prompts
        self.vision, self.dummy, self.grouping = vision, dummy_visuals(kind, vision), grouping

    def __call__(self, features: Sequence[Features]) -> Batch:
        left = self.positions is None
        groups = (self.grouping or alone)(features)
        shown = [features[group.members[0]] for group in groups]
        visuals = self._visuals(shown)
        if self.grouping is None:
            tokens = self._padded(features, left)
            layout, places = one_by_one(features, tokens.attention_mask)
        else:
            tokens = _packed(groups, features)
            layout, places = in_one_sequence(groups, features)
        sets = _sets(groups, features)
        samples = [f.sample for f in features]
        return Batch(
            ids=tuple(sample.id for sample in samples),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            token_types=tokens.token_types,
            position_ids=self._positions(groups, features, visuals, tokens),
            visuals=visuals,
            visual_tokens=tokens.token_types.flatten().nonzero().squeeze(-1),
            token_set=sets.token,
            frame_set=sets.frame,
            layout=None if left else layout,
            rows=None if left else answer_rows(features, places),
            cam_to_world=_poses(samples),
            target_box=_target_boxes(samples),
            what=None if left else prompt_rows(features, places),
            kinds=tuple(sample.kind for sample in samples),
            answers=tuple(sample.answer for sample in samples),
            prompts=self._prompts(features, sets) if self.with_prompts else None,
        )

    def _padded(self, features: Sequence[Features], left: bool) -> Tokens:
        """Every sample a sequence, padded to the longest."""
        return Tokens(
            input_ids=_pad([f.input_ids for f in features], self.pad_id, left),
            attention_mask=_pad([torch.ones_like(f.input_ids) for f in features], 0, left),
            token_types=_pad([f.token_types for f in features], 0, left),
        )

    def _positions(
        self, groups: Sequence[Group], features: Sequence[Features], visuals: Visuals, tokens: Tokens
    ) -> torch.Tensor | None:
        """Multimodal positions of all sequences; None for generation."""
        if self.positions is None:
            return None
        grid = None if visuals.dummy else visuals.grid_thw
        grids = {"image": (grid, None), "video": (None, grid)}[self.kind]
        if self.grouping is None:
            return self.positions(tokens.input_ids, tokens.token_types, tokens.attention_mask, *grids)
        firsts = self._padded([features[group.members[0]] for group in groups], left=False)
        positions = self.positions(firsts.input_ids, firsts.token_types, firsts.attention_mask, *grids)
        return joined_positions(groups, positions, [len(f.input_ids) for f in features])

    def _prompts(self, features: Sequence[Features], sets: _Sets) -> Prompts:
        """The prompts alone; each has its images to itself."""
        tokens = self._padded([_prompt(f) for f in features], left=True)
        order = [entry for each in sets.frame.tolist() if each >= 0 for entry in sets.entries[each]]
        return Prompts(*tokens, torch.cat([f.grid_thw for f in features]), tuple(order))

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


class _Sets(NamedTuple):
    """Sets of frames of a batch: `Batch.token_set`, `Batch.frame_set`, and per set the entries of `Visuals.sizes`."""

    token: torch.Tensor
    frame: torch.Tensor
    entries: list[range]


def _sets(groups: Sequence[Group], features: Sequence[Features]) -> _Sets:
    """A set per group that has frames, in order."""
    frame = torch.full((len(features),), -1, dtype=torch.int64)
    counts: list[int] = []
    entries: list[range] = []
    for group in groups:
        first, end = features[group.members[0]], entries[-1].stop if entries else 0
        if first.sample.frames:
            frame[list(group.members)] = len(entries)
            entries.append(range(end, end + int(first.grid_thw[:, 0].sum())))
            counts.append(int((first.token_types > 0).sum()))
    return _Sets(torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)), frame, entries)


def _packed(groups: Sequence[Group], features: Sequence[Features]) -> Tokens:
    """All samples in one sequence."""
    ids = joined(groups, [f.input_ids for f in features])[None]
    return Tokens(ids, torch.ones_like(ids), joined(groups, [f.token_types for f in features])[None])


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
