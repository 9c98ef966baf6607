"""``--geometry shuffle``: evaluation of every sample with the geometry of another room.

A control experiment: if the scores do not fall, the model ignores geometry. Prompt, visual tokens and the shape of the
geometry features are the sample's own; only the frames for the geometry encoder, or the point maps of an encoder of
point maps, come from another scene.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.frames.scale_reference import load_scale_reference
from w2r2_ds.data.images import Placement, frame_size, load_frame
from w2r2_ds.data.processor import Features
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample, room_of

PAIRING_SEED = 0
"""Seed of the pairing; the same for all checkpoints, so that their scores are comparable."""


def pair_scenes(scenes: Sequence[str], seed: int = PAIRING_SEED) -> dict[str, str]:
    """Assign a scene of another room to every scene.

    Args:
        scenes: scene ids, in any order; repetitions are ignored.
        seed: seed of the assignment.

    Returns:
        Scene id -> id of the scene whose geometry replaces its own. Every scene occurs once on both sides, unless there
        are several scans of one room (`types.sample.room_of`).

    Raises:
        ValueError: fewer than two different rooms.
    """
    names = sorted(set(scenes))
    rooms = {room_of(name) for name in names}
    if len(rooms) < 2:
        raise ValueError(
            f"--geometry shuffle needs samples of at least two rooms with frames, but there are {len(rooms)} (scans of "
            "one room count once); prepare more scenes."
        )
    # A random cycle in which each scene is assigned the next one of another room. Unlike independent draws or a random
    # permutation, a cycle assigns no scene to itself.
    cycle = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    partner = {}
    for index, name in enumerate(cycle):
        following = [*cycle[index + 1 :], *cycle[:index]]
        partner[name] = next(other for other in following if room_of(other) != room_of(name))
    return partner


class ShuffledGeometry:
    """A processor that replaces the geometry encoder's frames of a sample by those of another scene.

    The frames are those of the other scene's first sample in the data set, truncated or repeated from the start to the
    sample's number of frames; see `with_geometry_of`.

    Args:
        processor: (sample, whether to include its answer) -> features; must have no feature cache.
        geometry: patch size of the geometry encoder and kind of its input.
        samples: all samples of the data, not a rank's or a limited part, so that all ranks and limits have the same
            pairs.

    Raises:
        ValueError: fewer than two rooms have frames.
    """

    def __init__(
        self, processor: Callable[[Sample, bool], Features], geometry: GeometrySpec, samples: Sequence[Sample]
    ) -> None:
        self.processor, self.geometry = processor, geometry
        self.first_samples: dict[str, Sample] = {}  # scene id -> its first sample with frames
        for sample in samples:
            if sample.frames:
                self.first_samples.setdefault(sample.scene_id, sample)
        self.partner = pair_scenes(list(self.first_samples))

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample with another scene's `geometry_frames`; samples without frames are unchanged."""
        features = self.processor(sample, with_answer)
        if not sample.frames:
            return features
        frames = self.donor(sample.scene_id).frames
        chosen = [frames[index % len(frames)] for index in range(len(sample.frames))]
        return with_geometry_of(features, chosen, self.geometry)

    def donor(self, scene_id: str) -> Sample:
        """The sample whose frames replace those of a scene's samples."""
        return self.first_samples[self.partner[scene_id]]


def with_geometry_of(features: Features, frames: Sequence[Path], geometry: GeometrySpec) -> Features:
    """Features of a sample whose geometry is that of other frames.

    Each frame is resized to the size of the sample's own frames; a point map is computed at the patches of such a
    frame.

    Args:
        features: features with `geometry_frames`, from a processor without feature cache.
        frames: other frames, as many as the sample has.
        geometry: patch size of the geometry encoder and kind of its input.
    """
    inputs = features.visual
    # Cached geometry features would be used instead of the replaced frames.
    assert inputs.geometry_frames is not None and inputs.cached_3d is None, "the processor has no feature cache"
    height, width = geometry.frame_size(inputs.geometry_frames.shape)
    placements = [Placement(frame_size(path), (width, height)) for path in frames]
    if geometry.point_maps is None:
        pixels = {path: _resized(path, height, width) for path in dict.fromkeys(frames)}  # each is decoded once
        replaced = np.stack([pixels[path] for path in frames])  # [frames, 3, height, width]
    else:
        replaced = load_point_maps(frames, placements, (width, height), geometry)
    reference = None
    if geometry.scale_hint != "none":
        reference = torch.from_numpy(load_scale_reference(frames, placements, (width, height), geometry))
    visual = dataclasses.replace(inputs, geometry_frames=torch.from_numpy(replaced), scale_reference=reference)
    return dataclasses.replace(features, visual=visual)


def _resized(path: Path, height: int, width: int) -> np.ndarray:
    """Read and resize a frame: uint8 ``[3, height, width]``."""
    image = Image.fromarray(load_frame(path)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)
