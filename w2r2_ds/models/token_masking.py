"""Random masking of 2D tokens in the fused pass (`objective.visual_mask_ratio`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


def mask_images(
    images: Sequence[torch.Tensor], samples: Sequence[tuple[str, int]], ratio: float, seed: int, step: int
) -> list[torch.Tensor]:
    """Apply `mask_2d` to every image of a batch, with one random generator per sample.

    The masks depend on sample id, seed and step, not on the number of ranks or the other samples of the batch.

    Args:
        images: ``[tokens, hidden]`` each, sample by sample.
        samples: (id, number of images) of every sample.
        ratio: fraction of the tokens to mask.
        seed: the run's seed.
        step: optimizer step, so that a sample has other masks in every epoch.
    """
    masked: list[torch.Tensor] = []
    for sample, count in samples:
        # A cryptographic hash, because Python's own `hash` of a string differs from process to process.
        digest = hashlib.blake2b(f"{seed} {step} {sample}".encode(), digest_size=7).digest()
        own = images[len(masked) : len(masked) + count]
        generator = torch.Generator(own[0].device).manual_seed(int.from_bytes(digest)) if own else None
        masked += [mask_2d(image, ratio, generator) for image in own]
    assert len(masked) == len(images), f"{len(images)} images, but the samples have {len(masked)}"
    return masked


def mask_2d(visual: torch.Tensor, ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set exactly ``floor(ratio * tokens + 1/2)`` tokens of one image, drawn uniformly, to zero.

    The source is GeoSR's Geometry-Unleashing Masking (arXiv 2603.26639, section 3.2, static scenes): tokens times a
    0/1 mask, before the fusion, in training only. Its paper masks exactly ceil(0.8 * tokens) tokens of all frames of a
    sample, for half of the samples; its code masks every token independently with probability 0.8. Here every sample is
    masked, and the number is exact per image, so that all frames of a video keep the same fraction. ``ratio`` 0.4 masks
    as many tokens on average as the paper.

    Args:
        visual: ``[tokens, hidden]`` tokens of the vision tower, of one image or pair of video frames; not modified.
        ratio: in [0, 1]; 0 returns ``visual`` itself and draws no random numbers.
        generator: generator on the device of ``visual``; None is the default one.

    Returns:
        ``[tokens, hidden]``, same dtype; a masked token has no gradient.
    """
    assert 0 <= ratio <= 1, f"the ratio of masked tokens is {ratio}"
    if ratio == 0:
        return visual
    count = math.floor(ratio * len(visual) + 0.5)
    masked = torch.randperm(len(visual), generator=generator, device=visual.device)[:count]
    return visual.index_fill(0, masked, 0.0)
