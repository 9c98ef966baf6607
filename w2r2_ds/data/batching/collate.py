"""Collate `Features` of samples into a `Batch`, on the CPU: padding or packing, labels, position ids, visual inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from w2r2_ds.data.answer_labels import collate_answer_positions, collate_description_positions
from w2r2_ds.data.batching.packing import (
    Group,
    Grouping,
    pack_position_ids,
    pack_tokens,
    packed_layout,
    padded_layout,
    separate_groups,
)
from w2r2_ds.data.batching.scene_pairs import pair_scenes
from w2r2_ds.data.frames.anchor_inputs import AnchorCollator
from w2r2_ds.data.processor import Features
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.models.frame_pixels import even_size
from w2r2_ds.types.batch import Batch, Layout, Prompts, Tokens, Visuals
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec

GRAY = 128
"""Pixel value of the dummy."""

PositionIds = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""(input_ids, token_types, attention_mask, patch grids by kind) -> ``[axes, sequences, length]`` int64."""


class Collator:
    """`collate_fn` of the data loaders: a list of `Features` -> `Batch`.

    There are three layouts:

    * generation (`position_ids` is None): one sequence per sample, padded on the left;
    * training without `grouping`: one sequence per sample, padded on the right;
    * training with `grouping`: all samples packed into one sequence.

    Args:
        pad_id: id of the padding token.
        kind: ``"image"`` or ``"video"``.
        position_ids: computes multimodal position ids, on the CPU, because computing them on the GPU needs a host
            sync; None for generation.
        vision: patch sizes of the vision tower.
        geometry: patch size of the geometry encoder and kind of its input, for the dummy image.
        family: VLM family; computes the inputs of its vision tower.
        with_prompts: also make `Batch.prompts`, to decode answers during training.
        grouping: partition of the samples into groups with a common prefix, for one packed sequence; None for padded
            sequences.
        pad_to_multiple_of: the length of training sequences is rounded up to a multiple of it.
        anchors: makes `Batch.anchors`; None for batches without.
    """

    def __init__(
        self,
        pad_id: int,
        kind: str,
        position_ids: PositionIds | None,
        vision: VisionSpec,
        geometry: GeometrySpec,
        family: VlmFamily,
        with_prompts: bool = False,
        grouping: Grouping | None = None,
        pad_to_multiple_of: int = 1,
        anchors: AnchorCollator | None = None,
    ) -> None:
        assert grouping is None or position_ids is not None, "prompts for generation are not packed"
        self.pad_id, self.kind, self.position_ids, self.with_prompts = pad_id, kind, position_ids, with_prompts
        self.vision, self.family, self.grouping = vision, family, grouping
        self.pad_to_multiple_of, self.anchors = pad_to_multiple_of, anchors
        self.dummy = dummy_visuals(kind, vision, geometry, family)

    def __call__(self, features: Sequence[Features]) -> Batch:
        """Collate one micro-batch.

        Raises:
            ValueError: samples of one group have frames after the common prefix.
        """
        training = self.position_ids is not None
        groups = (self.grouping or separate_groups)(features)
        # All members of a group have the same frames; the encoders run on those of its first member.
        visuals = self._visuals([features[group.members[0]] for group in groups])
        if self.grouping is None:
            # The lengths of prompts are not rounded: every decoded token has another number of keys anyway.
            tokens = self._padded(features, left=not training, multiple=self.pad_to_multiple_of if training else 1)
            layout, placements = padded_layout(features, tokens.attention_mask)
        else:
            layout, placements = packed_layout(groups, features)
            tokens, layout = self._packed(groups, features, layout)
        sets = _frame_sets(groups, features)
        samples = [f.sample for f in features]
        # The samples whose frames are the frame sets, in the order of the visual tokens.
        with_frames = [f for f in (features[group.members[0]] for group in groups) if f.sample.frames]
        return Batch(
            ids=tuple(sample.id for sample in samples),
            tasks=tuple(sample.task for sample in samples),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            token_types=tokens.token_types,
            position_ids=self._position_ids(groups, features, visuals, tokens),
            visuals=visuals,
            visual_tokens=tokens.token_types.flatten().nonzero().squeeze(-1),
            frame_set_of_token=sets.token,
            frame_set_of_sample=sets.sample,
            layout=layout if training else None,
            # Labels are not a copy of input_ids with -100 at the prompt: only answer tokens have labels, so that the
            # LM head is applied to their positions only.
            optional_answer_positions=collate_answer_positions(features, placements) if training else None,
            optional_description_positions=collate_description_positions(features, placements) if training else None,
            cam_to_world=_poses(samples),
            target_box=_target_boxes(samples),
            kinds=tuple(sample.kind for sample in samples),
            box_formats=tuple(sample.box_format for sample in samples),
            answers=tuple(sample.answer for sample in samples),
            prompts=self._prompts(features, sets) if self.with_prompts else None,
            anchors=None if self.anchors is None else self.anchors(samples, [f.sample for f in with_frames]),
            other_geometry=pair_scenes(with_frames, sets.token, sets.sample) if training else None,
        )

    def _padded(self, features: Sequence[Features], left: bool, multiple: int = 1) -> Tokens:
        """One sequence per sample, on the left or on the right padded to the longest, rounded up to a multiple."""
        tokens = Tokens(
            input_ids=_pad([f.input_ids for f in features], self.pad_id, left),
            attention_mask=_pad([torch.ones_like(f.input_ids) for f in features], 0, left),
            token_types=_pad([f.token_types for f in features], 0, left),
        )
        return self._append_padding(tokens, -tokens.input_ids.shape[1] % multiple)

    def _packed(self, groups: Sequence[Group], features: Sequence[Features], layout: Layout) -> tuple[Tokens, Layout]:
        """All samples in one sequence ``[1, length]``, and its layout; padded on the right as `_padded` does."""
        ids = pack_tokens(groups, [f.input_ids for f in features])[None]
        types = pack_tokens(groups, [f.token_types for f in features])[None]
        missing = -ids.shape[1] % self.pad_to_multiple_of
        tokens = self._append_padding(Tokens(ids, torch.ones_like(ids), types), missing)
        group, suffix = pad(layout.group, (0, missing), value=-1), pad(layout.suffix, (0, missing))
        return tokens, dataclasses.replace(layout, group=group, suffix=suffix)

    def _append_padding(self, tokens: Tokens, count: int) -> Tokens:
        """The sequences with `count` more tokens of padding on the right."""
        return Tokens(
            input_ids=pad(tokens.input_ids, (0, count), value=self.pad_id),
            attention_mask=pad(tokens.attention_mask, (0, count)),
            token_types=pad(tokens.token_types, (0, count)),
        )

    def _position_ids(
        self, groups: Sequence[Group], features: Sequence[Features], visuals: Visuals, tokens: Tokens
    ) -> torch.Tensor | None:
        """Position ids of all sequences, ``[axes, sequences, length]`` int64; None for generation."""
        if self.position_ids is None:
            return None
        grids = {} if visuals.dummy else {self.kind: visuals.grid_thw}
        if self.grouping is None:
            return self.position_ids(tokens.input_ids, tokens.token_types, tokens.attention_mask, grids)
        # The family computes position ids of padded sequences. It is called for the first member of each group, which
        # has all frames; `pack_position_ids` derives those of the other suffixes, which are text.
        first_members = self._padded([features[group.members[0]] for group in groups], left=False)
        position_ids = self.position_ids(
            first_members.input_ids, first_members.token_types, first_members.attention_mask, grids
        )
        position_ids = pack_position_ids(groups, position_ids, [len(f.input_ids) for f in features])
        return pad(position_ids, (0, tokens.input_ids.shape[1] - position_ids.shape[-1]))

    def _prompts(self, features: Sequence[Features], sets: _FrameSets) -> Prompts:
        """The prompts of the samples, without answers, padded on the left."""
        tokens = self._padded([_without_answer(f) for f in features], left=True)
        # Samples of a group share the encoded frames, but their prompts are separate sequences: `order` repeats the
        # indices of the frames for every prompt.
        order = [entry for frame_set in sets.sample.tolist() if frame_set >= 0 for entry in sets.entries[frame_set]]
        return Prompts(*tokens, torch.cat([f.visual.grid_thw for f in features]), tuple(order))

    def _visuals(self, features: Sequence[Features]) -> Visuals:
        """Visual inputs of one sample per group; the dummy if no sample has frames."""
        with_frames = [f for f in features if f.sample.frames]
        if not with_frames:
            return self.dummy
        inputs = [f.visual for f in with_frames]
        cached_3d = tuple(visual.cached_3d for visual in inputs if visual.cached_3d is not None)
        cached_2d = tuple(visual.cached_2d for visual in inputs if visual.cached_2d is not None)
        # Without a cache of 2D features, the tower runs once on all frame sets. With one, it runs once per frame set
        # that the cache lacks (`uncached`), so that each result is stored under its own key.
        frames = [visual.tower_frames for visual in inputs if visual.tower_frames is not None and not cached_2d]
        grid_thw = torch.cat([visual.grid_thw for visual in inputs])
        visuals = dataclasses.replace(
            tower_input(self.kind, frames, grid_thw, self.vision, self.family),
            geometry_frames=tuple(visual.geometry_frames for visual in inputs),
            scale_reference=tuple(visual.scale_reference for visual in inputs),
            ids=tuple(f.sample.id for f in with_frames),
            cached_3d=cached_3d,
            cached_2d=cached_2d,
        )
        if not cached_2d:
            return visuals
        uncached = tuple(
            None
            if visual.tower_frames is None
            else tower_input(self.kind, [visual.tower_frames], visual.grid_thw, self.vision, self.family)
            for visual in inputs
        )
        return dataclasses.replace(visuals, uncached=uncached, filler=self.dummy)


def tower_input(
    kind: str, frames: Sequence[torch.Tensor], grid_thw: torch.Tensor, vision: VisionSpec, family: VlmFamily
) -> Visuals:
    """`Visuals` with inputs of the vision tower only.

    Args:
        kind: ``"image"`` or ``"video"``.
        frames: per frame set, ``[frames, 3, height, width]`` uint8.
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width).
        vision: patch sizes and normalisation of the vision tower.
        family: VLM family; computes the tower's other inputs.
    """
    sizes = token_counts(grid_thw, vision.merge_size)
    tower = family.tower_inputs(grid_thw, vision)
    return Visuals(kind, grid_thw, sizes, tower, vision, tower_frames=tuple(frames), geometry_frames=())


def dummy_visuals(kind: str, vision: VisionSpec, geometry: GeometrySpec, family: VlmFamily) -> Visuals:
    """Gray visual inputs of at least 2 x 2 merged patches: one image, or a video of one temporal patch.

    As with real frames, the geometry encoder gets a multiple of its patch size, and the vision tower a crop of it. The
    point map of the dummy has no measured depth, and its scale is unknown.
    """
    frames = vision.temporal_patch_size if kind == "video" else 1
    min_side = 2 * vision.merge_size * vision.patch_size
    side = math.ceil(min_side / geometry.patch_size) * geometry.patch_size
    image = torch.full((frames, 3, side, side), GRAY, dtype=torch.uint8)
    even_side, _ = even_size(side, side, vision.patch_size, vision.merge_size)
    grid_thw = family.grid_thw(frames, even_side, even_side, vision, kind)
    visuals = tower_input(kind, [image], grid_thw, vision, family)
    if geometry.point_maps is None:
        shape = geometry.scale_reference_shape(frames, side, side)
        reference = None if shape is None else torch.full(shape, torch.nan)
        return dataclasses.replace(visuals, geometry_frames=(image,), scale_reference=(reference,), dummy=True)
    no_depth = torch.full(geometry.point_map_shape(frames, side, side), torch.nan)
    return dataclasses.replace(visuals, geometry_frames=(no_depth,), dummy=True)


def token_counts(grid_thw: torch.Tensor, merge_size: int) -> tuple[int, ...]:
    """Number of tokens of every image, or of every temporal patch of the videos.

    Args:
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width).
        merge_size: patches per side that become one token.
    """
    return tuple(height * width // merge_size**2 for time, height, width in grid_thw.tolist() for _ in range(time))


class _FrameSets(NamedTuple):
    """Frame sets of a batch (see `Visuals`).

    Attributes:
        token: ``[visual tokens]`` int64, frame set of every visual token (`Batch.frame_set_of_token`).
        sample: ``[batch]`` int64, frame set of every sample or -1 (`Batch.frame_set_of_sample`).
        entries: per frame set, the indices in `Visuals.sizes` of its images or temporal patches.
    """

    token: torch.Tensor
    sample: torch.Tensor
    entries: list[range]


def _frame_sets(groups: Sequence[Group], features: Sequence[Features]) -> _FrameSets:
    """One frame set per group that has frames, in the order of the groups."""
    sample = torch.full((len(features),), -1, dtype=torch.int64)
    num_tokens: list[int] = []  # visual tokens of every frame set
    entries: list[range] = []
    for group in groups:
        first, begin = features[group.members[0]], entries[-1].stop if entries else 0
        if first.sample.frames:
            sample[list(group.members)] = len(entries)
            # one entry per temporal patch; an image has one
            entries.append(range(begin, begin + int(first.visual.grid_thw[:, 0].sum())))
            num_tokens.append(int((first.token_types > 0).sum()))
    return _FrameSets(torch.repeat_interleave(torch.tensor(num_tokens, dtype=torch.int64)), sample, entries)


def _without_answer(feature: Features) -> Features:
    """The features of a sample's prompt."""
    count = len(feature.input_ids) - feature.num_answer_tokens
    return dataclasses.replace(
        feature, input_ids=feature.input_ids[:count], token_types=feature.token_types[:count], num_answer_tokens=0
    )


def _pad(sequences: Sequence[torch.Tensor], value: int, left: bool) -> torch.Tensor:
    """Stack ``[length]`` int64 tensors into ``[batch, longest]``, padded with `value` on the left or on the right."""
    side = "left" if left else "right"
    return pad_sequence(list(sequences), batch_first=True, padding_value=value, padding_side=side)


def _poses(samples: Sequence[Sample]) -> torch.Tensor:
    """``[batch, frames >= 1, 4, 4]`` float64 camera poses.

    The poses of missing frames are NaN, so that a box predicted in such a frame has IoU 0.
    """
    count = max([1, *(len(sample.frames) for sample in samples)])
    result = torch.full((len(samples), count, 4, 4), torch.nan, dtype=torch.float64)
    for index, sample in enumerate(samples):
        result[index, : len(sample.frames)] = torch.from_numpy(sample.cam_to_world)
    return result


def _target_boxes(samples: Sequence[Sample]) -> torch.Tensor:
    """``[batch, 9]`` float64, NaN for a sample without a target."""
    no_box = np.full(9, np.nan)
    return torch.from_numpy(np.stack([no_box if s.target is None else s.target.box for s in samples]))
