"""Batches with the inputs of attention anchors: intrinsics of the fixture's frames, and a typical box made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from w2r2_ds.data.frames.token_rays import scene_folder
from w2r2_ds.data.frames.typical_box import TypicalBox
from w2r2_ds.data.loader import make_collate, make_processor

FOCAL = 70.0
TYPICAL = TypicalBox(depth=3.0, size=np.array([1.0, 0.8, 1.5]), class_sizes={17: np.array([1.2, 0.9, 1.6])}, samples=3)
"""The class of `tests/conftest.py`'s target is 17; its box has this size."""


def write_intrinsic(sample: Any, width: int = 80, height: int = 60) -> None:
    """A pinhole camera in the middle of the images, beside the frames of the sample."""
    matrix = np.eye(4)
    matrix[:2, :3] = [[FOCAL, 0, (width - 1) / 2], [0, FOCAL, (height - 1) / 2]]
    np.savetxt(scene_folder(sample.frames[0]) / "intrinsic.txt", matrix)


def anchored(frontend: Any, data_config: Callable[..., Any]) -> Callable[..., Any]:
    """Function `(samples, **data_config_changes)`: the loader's batch with `Batch.anchors`."""

    def make(samples: Sequence[Any], typical: TypicalBox = TYPICAL, **changes: Any) -> Any:
        for sample in samples:
            if sample.frames:
                write_intrinsic(sample)
        config = data_config(**changes)
        processor = make_processor(frontend, config)
        collate = make_collate(frontend, config, typical=typical)
        return collate([processor(sample, True) for sample in samples])

    return make


def attention_at(batch: Any, tokens: Sequence[int]) -> torch.Tensor:
    """``[batch, visual tokens]``: each sample's attention is spread thinly, with most of it on one token."""
    attention = torch.full((len(batch.ids), len(batch.visual_tokens)), 0.01)
    attention[torch.arange(len(tokens)), torch.tensor(tokens)] = 0.6
    return attention
