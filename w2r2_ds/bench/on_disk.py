"""The features of a set of frames in a real cache, and batches that have read them there, as the loader does."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from w2r2_ds.data.collate import Batch, moved
from w2r2_ds.geometry.cache import Cache
from w2r2_ds.geometry.cached import FeatureCache, flush
from w2r2_ds.models.w2r2 import W2R2

ROOM = 2**40
"""Bytes that the cache may have: more than any case needs."""


class OnDisk:
    """A cache in a folder of its own, filled with both encoders' features of a batch's only set of frames.

    Args:
        model: whose encoders make them.
        batch: without a cache; of one set of frames.
    """

    def __init__(self, model: W2R2, batch: Batch) -> None:
        (images,) = batch.visuals.geometry_images
        assert images is not None, "a batch without a cache"
        self.folder = tempfile.TemporaryDirectory()
        self.frames = write_pixels(Path(self.folder.name), images)
        self.cache = FeatureCache(Cache(Path(self.folder.name) / "cache", ROOM), "geometry", "vision")
        self.kept_2d, self.kept_3d = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)[0]
        two, three = self.cache.find_2d(self.frames), self.cache.find_3d(self.frames)
        assert two is not None, "both kinds are cached"
        two.keep(torch.cat(self.kept_2d.pooler_output))
        three.keep(self.kept_3d)
        flush()

    def into(self, batch: Batch, both: bool) -> Batch:
        """A batch about these frames with geometry features, and with `both` 2D ones too, read now."""
        visuals = replace(batch.visuals, geometry_images=(None,), cached_3d=(self.cache.find_3d(self.frames),))
        if both:
            two = self.cache.find_2d(self.frames)
            assert two is not None, "both kinds are cached"
            visuals = replace(visuals, cached_2d=(two,), alone=(None,))
        return replace(batch, visuals=moved(visuals, batch.input_ids.device))


def write_pixels(folder: Path, images: torch.Tensor) -> tuple[Path, ...]:
    """A file per frame with the bytes of its pixels: keys are made of what files hold."""
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"frame{index}.raw")
        paths[-1].write_bytes(image.mul(255).byte().cpu().numpy().tobytes())
    return tuple(paths)
