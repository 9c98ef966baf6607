"""Both encoders of a batch: run where the cache lacks what they make, and it is given what was made.

The vision tower of a sample from the cache has seen this sample alone. So where its features are cached it is called
sample by sample, also for those that are missing: a value does not depend on what else was in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from w2r2_ds.models.geometry_encoder import GeometryEncoder

if TYPE_CHECKING:
    from w2r2_ds.models.w2r2 import VisualInputs


def encode_cached(encode: Callable[[VisualInputs], Any], visuals: VisualInputs, calls: int = 0) -> Any:
    """F2D of a batch, of the cache or of `encode`, which is called `calls` times at least; what was missing is kept."""
    spare = visuals.spare or visuals
    if not visuals.cached_2d:
        assert visuals.dummy or not calls, "a batch with frames has asked the cache wherever ranks agree on calls"
        output, made = encode(visuals), 1
    else:
        features, made = [], 0
        for cached, alone in zip(visuals.cached_2d, visuals.alone, strict=True):
            if cached.features is None:
                assert alone is not None, "what the cache lacks has its patches with it"
                features.append(torch.cat(encode(alone).pooler_output))
                cached.keep(features[-1])
                made += 1
            else:
                features.append(cached.features)
        # Of a tower's output the stock forward reads nothing else.
        output = BaseModelOutputWithPooling(pooler_output=torch.split(torch.cat(features), list(visuals.sizes)))
    for _ in range(calls - made):
        encode(spare)
    return output


def missing_2d(visuals: VisualInputs) -> int:
    """How often `encode_cached` calls the tower for a batch's own sake."""
    return sum(cached.features is None for cached in visuals.cached_2d) if visuals.cached_2d else 1


def encode_geometry(geometry: GeometryEncoder, visuals: VisualInputs) -> list[torch.Tensor]:
    """Per sample with frames the features of a geometry encoder, or the cache's; the missing is kept."""
    if not visuals.cached_3d:
        return [geometry.encode(images) for images in visuals.geometry_images if images is not None]
    result = []
    for cached, images in zip(visuals.cached_3d, visuals.geometry_images, strict=True):
        features = cached.features
        if features is None:
            assert images is not None, "what the cache lacks has its images with it"
            features = geometry.encode(images)
            cached.keep(features)
        result.append(features)
    return result
