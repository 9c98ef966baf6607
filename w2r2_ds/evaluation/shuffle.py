"""``--geometry shuffle``: every sample gets another scene's geometry, while its images stay right.

If a model's answers do not suffer, it does not look at geometry. The 2D tokens, the prompt and the shape of the
geometry are those of the sample; only the frames that the geometry encoder sees belong to another room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from w2r2_ds.data.images import load_frame
from w2r2_ds.data.processor import Features
from w2r2_ds.types.sample import Sample

SEED = 0
"""Of the pairing, so that all checkpoints are shown the same wrong rooms."""


def pair_scenes(scenes: Sequence[str], seed: int = SEED) -> dict[str, str]:
    """Scene -> the scene whose geometry it gets: all of them in one random circle, so none gets its own.

    Args:
        scenes: at least two; order and repetition do not matter.
        seed: of the circle.

    Raises:
        ValueError: fewer than two different scenes.
    """
    names = sorted(set(scenes))
    if len(names) < 2:
        raise ValueError(
            f"--geometry shuffle needs samples of at least two scenes with frames, but there are {len(names)}; "
            "prepare more scenes."
        )
    circle = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    return dict(zip(circle, [*circle[1:], circle[0]], strict=True))


class ShuffledGeometry:
    """A processor whose features have the geometry images of the scene's partner.

    The partner's frames are those of its first sample in the data set: cut to as many as the sample has, or begun again
    from the first. Each is resized to the sample's own geometry images, also if the shape of the pictures differs.

    Args:
        processor: sample and whether with its answer -> features.
        samples: the whole data set, not a rank's share or a limited part: all must find the same pairs.
        seed: see ``pair_scenes``.

    Raises:
        ValueError: see ``pair_scenes``.
    """

    def __init__(
        self, processor: Callable[[Sample, bool], Features], samples: Sequence[Sample], seed: int = SEED
    ) -> None:
        self.processor = processor
        self.first: dict[str, Sample] = {}
        for sample in samples:
            if sample.frames:
                self.first.setdefault(sample.scene_id, sample)
        self.partner = pair_scenes(list(self.first), seed)

    def __call__(self, sample: Sample, with_answer: bool) -> Features:
        """Features of one sample, its geometry images replaced; without frames there is nothing to replace."""
        features = self.processor(sample, with_answer)
        inputs = features.visual
        # The other scene's features must be neither skipped nor kept as this one's.
        assert inputs.cached_3d is None, "the processor of a swap asks no cache"
        if inputs.geometry_images is None:
            return features
        frames = self.donor(sample.scene_id).frames
        chosen = [frames[index % len(frames)] for index in range(len(sample.frames))]
        height, width = inputs.geometry_images.shape[-2:]
        pixels = {path: _resized(path, height, width) for path in dict.fromkeys(chosen)}
        images = np.stack([pixels[path] for path in chosen])
        return dataclasses.replace(
            features, visual=dataclasses.replace(inputs, geometry_images=torch.from_numpy(images))
        )

    def donor(self, scene_id: str) -> Sample:
        """The sample whose frames a scene's samples get."""
        return self.first[self.partner[scene_id]]


def _resized(path: object, height: int, width: int) -> np.ndarray:
    """``float32 [3, height, width]`` in [0, 1]."""
    image = Image.fromarray(load_frame(str(path))).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
