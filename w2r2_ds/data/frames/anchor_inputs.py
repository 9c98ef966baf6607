"""Collate `AnchorInputs`: rays of visual tokens, and the typical box of every sample, for attention anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from w2r2_ds.data.frames.token_rays import token_rays
from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.data.visual_inputs import VisualPreprocessor
from w2r2_ds.types.batch import AnchorInputs
from w2r2_ds.types.sample import Sample


@dataclass(frozen=True)
class AnchorCollator:
    """Makes `Batch.anchors`, in DataLoader workers.

    Attributes:
        preprocessor: options of pre-processing, which determine the pixels of a token.
        typical: typical box of the training set.
    """

    preprocessor: VisualPreprocessor
    typical: TypicalBox

    def __call__(self, samples: Sequence[Sample], frame_sets: Sequence[Sample]) -> AnchorInputs:
        """Anchor inputs of a batch.

        Args:
            samples: all samples.
            frame_sets: one sample per frame set of the batch, in the order of the visual tokens.
        """
        rays = [token_rays(sample, self.preprocessor) for sample in frame_sets]
        frames = [np.zeros(0, dtype=np.int64), *(frame for frame, _ in rays)]
        points = [np.zeros((0, 3)), *(point for _, point in rays)]
        has_box = [sample.kind == "grounding" and sample.target is not None for sample in samples]
        sizes = [
            self.typical.size_of(sample) if own else np.full(3, np.nan)
            for sample, own in zip(samples, has_box, strict=True)
        ]
        return AnchorInputs(
            frame=torch.from_numpy(np.concatenate(frames)),
            ray=torch.from_numpy(np.concatenate(points)),
            depth=torch.tensor([self.typical.depth if own else np.nan for own in has_box], dtype=torch.float64),
            size=torch.from_numpy(np.stack(sizes)),
        )
