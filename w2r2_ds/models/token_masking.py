"""Random masking of 2D tokens in the fused pass (`objective.visual_mask_ratio`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


def mask_images(
    images: Sequence[torch.Tensor], owners: Sequence[tuple[str, int]], share: float, seed: int, step: int
) -> list[torch.Tensor]:
    """`mask_2d` of every image of a batch, with a random generator per sample.

    The masks depend on sample id, seed and step, not on the number of ranks or the other samples of the batch.

    Args:
        images: ``[tokens, hidden]`` each, sample by sample.
        owners: id and number of images of every sample.
        share: fraction of the tokens to mask.
        seed: the run's seed.
        step: optimizer step; a sample has other masks in every epoch.
    """
    masked: list[torch.Tensor] = []
    for identity, count in owners:
        digest = hashlib.blake2b(f"{seed} {step} {identity}".encode(), digest_size=7).digest()
        own = images[len(masked) : len(masked) + count]
        generator = torch.Generator(own[0].device).manual_seed(int.from_bytes(digest)) if own else None
        masked += [mask_2d(image, share, generator) for image in own]
    assert len(masked) == len(images), f"{len(images)} images, {len(masked)} of them with an owner"
    return masked


def mask_2d(visual: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set exactly ``floor(share * tokens + 1/2)`` tokens of one image, drawn uniformly, to zero.

    The baseline is GeoSR's Geometry-Unleashing Masking (arXiv 2603.26639, section 3.2, static scenes): a token times a
    0/1 mask, before fusion, in training only. The paper draws an exact number, ceil(0.8 * tokens) over all frames of a
    sample, and does so for half of the samples; its code draws every token by itself with probability 0.8. Here the
    number is exact too, but per image, so that no frame of a video keeps more than its share, and every sample of the
    fused pass is masked. With its rates, ``share`` 0.4 hides as many tokens on average.

    Args:
        visual: ``[tokens, hidden]`` tokens of the vision tower, of one image or pair of video frames; left unchanged.
        share: in [0, 1]; 0 returns ``visual`` itself and draws nothing.
        generator: on the device of ``visual``; None is the default one.

    Returns:
        ``[tokens, hidden]``, same dtype; a masked token has no gradient.
    """
    assert 0 <= share <= 1, f"a share of the tokens, not {share}"
    if share == 0:
        return visual
    count = math.floor(share * len(visual) + 0.5)
    masked = torch.randperm(len(visual), generator=generator, device=visual.device)[:count]
    return visual.index_fill(0, masked, 0.0)
