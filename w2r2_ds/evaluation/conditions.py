"""Conditions of an evaluation: what the model gets as input, from the complete input to no image at all.

fused      Phi(F2D, F3D): frames and their geometry
zero       Phi(F2D, 0): 2D only
shuffle    Phi(F2D, F3D) with the geometry of another scene (``shuffle.py``)
no_image   Phi(F2D, 0) with gray frames: prompt, number of frames and answer format stay, the content of the frames is
           removed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from w2r2_ds.data.batching.collate import GRAY
from w2r2_ds.data.processor import Features
from w2r2_ds.evaluation.shuffle import PAIRING_SEED, ShuffledGeometry
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample

SampleProcessor = Callable[[Sample, bool], Features]
"""(sample, whether to include its answer) -> features."""


@dataclass(frozen=True)
class Condition:
    """Inputs of the model in one evaluation.

    Attributes:
        name: part of the names of the result files.
        geometry: ``fused``, Phi(F2D, F3D), or ``zero``, Phi(F2D, 0).
        processor: (processor without feature cache, geometry encoder's sizes, all samples of the data) -> processor
            with other inputs; None for the sample's own inputs. Other inputs are not looked up in the feature cache,
            which identifies features by the sample's frame files.
        options: seeds and numbers that the answers depend on; saved answers with other options are not reused.
    """

    name: str
    geometry: str
    processor: Callable[[SampleProcessor, GeometrySpec, Sequence[Sample]], SampleProcessor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class GrayFrames:
    """A processor that replaces all pixels of the vision tower's frames by one gray value.

    A prompt without frames would have another form than all prompts of the training: no frame numbers, and a frame
    index in the answer that refers to nothing. Gray frames remove what the frames show, and nothing else.

    Args:
        processor: must have no feature cache.
    """

    def __init__(self, processor: SampleProcessor) -> None:
        self.processor = processor

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample with gray frames; those without without frames are unchanged."""
        features = self.processor(sample, with_answer)
        inputs = features.visual
        assert inputs.cached_2d is None and inputs.cached_3d is None, "the processor has no feature cache"
        if inputs.tower_frames is None:
            return features
        gray = torch.full_like(inputs.tower_frames, GRAY)
        return dataclasses.replace(features, visual=dataclasses.replace(inputs, tower_frames=gray))


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("fused", "fused"),
        Condition("zero", "zero"),
        Condition(
            "shuffle",
            "fused",
            ShuffledGeometry,
            {"shuffle_seed": PAIRING_SEED},
        ),
        Condition("no_image", "zero", lambda processor, *_: GrayFrames(processor), {"gray": GRAY}),
    )
}
"""Value of ``--geometry`` -> condition."""


def find_condition(name: str) -> Condition:
    """The condition of a value of ``--geometry``; raises ValueError if there is none."""
    if name not in CONDITIONS:
        raise ValueError(f"--geometry is {name!r}; it is one of {', '.join(CONDITIONS)}.")
    return CONDITIONS[name]
