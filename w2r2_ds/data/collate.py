"""Features -> Batch: right-padded for training, left-padded for generation. Everything the step reads is made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from w2r2_ds.data.answer_positions import answer_positions, description_positions
from w2r2_ds.data.packing import (
    Group,
    Grouping,
    pack_position_ids,
    pack_tokens,
    packed_layout,
    padded_layout,
    separate_groups,
)
from w2r2_ds.data.processor import Features
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.types.batch import Batch, Prompts, Tokens, Visuals
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec

Positions = Callable[..., torch.Tensor]
"""(input_ids, token_types, attention_mask, image grid or None, video grid or None) -> ``[3, batch, length]``."""


class Collator:
    """Make a `Batch` of `Features`.

    Args:
        pad_id: padding token.
        kind: ``"image"`` or ``"video"``.
        positions: multimodal positions, computed here so that the GPU never waits for them; None pads on the left,
            for generation.
        vision, geometry: sizes of both encoders, for the dummy image of a batch without frames.
        family: builds the inputs of its vision tower.
        with_prompts: also make `Batch.prompts`.
        grouping: which samples share frames, packed into one sequence; None makes a padded sequence of each.
    """

    def __init__(
        self,
        pad_id: int,
        kind: str,
        positions: Positions | None,
        vision: VisionSpec,
        geometry: GeometrySpec,
        family: VlmFamily,
        with_prompts: bool = False,
        grouping: Grouping | None = None,
    ) -> None:
        assert grouping is None or positions is not None, "prompts for generation are not packed"
        self.pad_id, self.kind, self.positions, self.with_prompts = pad_id, kind, positions, with_prompts
        self.family = family
        self.vision, self.dummy, self.grouping = vision, dummy_visuals(kind, vision, geometry, family), grouping

    def __call__(self, features: Sequence[Features]) -> Batch:
        left = self.positions is None
        groups = (self.grouping or separate_groups)(features)
        shown = [features[group.members[0]] for group in groups]
        visuals = self._visuals(shown)
        if self.grouping is None:
            tokens = self._padded(features, left)
            layout, placements = padded_layout(features, tokens.attention_mask)
        else:
            tokens = _packed(groups, features)
            layout, placements = packed_layout(groups, features)
        sets = _sets(groups, features)
        samples = [f.sample for f in features]
        return Batch(
            ids=tuple(sample.id for sample in samples),
            tasks=tuple(sample.task for sample in samples),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            token_types=tokens.token_types,
            position_ids=self._positions(groups, features, visuals, tokens),
            visuals=visuals,
            visual_tokens=tokens.token_types.flatten().nonzero().squeeze(-1),
            token_set=sets.token,
            frame_set=sets.frame,
            layout=None if left else layout,
            answer=None if left else answer_positions(features, placements),
            cam_to_world=_poses(samples),
            target_box=_target_boxes(samples),
            description=None if left else description_positions(features, placements),
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
        return pack_position_ids(groups, positions, [len(f.input_ids) for f in features])

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
            tower_input(self.kind, patches, grid_thw, self.vision, self.family),
            geometry_images=tuple(f.geometry_images for f in seen),
            ids=tuple(f.sample.id for f in seen),
            cached_3d=cached_3d,
            cached_2d=cached_2d,
        )
        if not cached_2d:
            return visuals
        alone = tuple(
            tower_input(self.kind, f.pixel_values, f.grid_thw, self.vision, self.family)
            if len(f.pixel_values)
            else None
            for f in seen
        )
        return dataclasses.replace(visuals, alone=alone, spare=self.dummy)


def tower_input(
    kind: str, patches: torch.Tensor, grid_thw: torch.Tensor, vision: VisionSpec, family: VlmFamily
) -> Visuals:
    """Inputs of the vision tower from patches and their grids, without geometry and sample ids."""
    sizes = token_counts(grid_thw, vision.merge_size)
    tower = family.tower_inputs(grid_thw, vision)
    return Visuals(kind, patches, grid_thw, sizes, tower, ())


def dummy_visuals(kind: str, vision: VisionSpec, geometry: GeometrySpec, family: VlmFamily) -> Visuals:
    """One gray image of two by two merged patches, or a video of as many frames as make one row of tokens."""
    frames = vision.temporal_patch_size if kind == "video" else 1
    side = 2 * vision.merge_size
    # Both encoders get a grid of as many patches, each of its own patch size.
    image, geometry_image = (
        np.full((frames, 3, side * patch_size, side * patch_size), 0.5, dtype=np.float32)
        for patch_size in (vision.patch_size, geometry.patch_size)
    )
    visuals = tower_input(kind, *family.pixel_values(image, vision, kind), vision, family)
    return dataclasses.replace(visuals, geometry_images=(torch.from_numpy(geometry_image),), dummy=True)


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
    ids = pack_tokens(groups, [f.input_ids for f in features])[None]
    return Tokens(ids, torch.ones_like(ids), pack_tokens(groups, [f.token_types for f in features])[None])


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
