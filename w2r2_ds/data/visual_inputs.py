"""Preprocess the frames of a sample for the vision tower and the geometry encoder; runs in DataLoader workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.images import even_crop, even_size, fitted_size, frame_size, load_resized, lost_height, stack_frames
from w2r2_ds.features.lookup import CacheLookup, FeatureCache
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec


@dataclass(frozen=True)
class VisualInputs:
    """Inputs of the vision tower and the geometry encoder for one sample, or their cached features.

    Attributes:
        pixel_values: ``[patches, channels * time * patch * patch]`` float32, the vision tower's input; no patches
            without frames, or if `cached_2d` has its output.
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width), also with cached features.
        geometry_images: ``[frames, 3, height, width]`` float32 in [0, 1], the geometry encoder's input, not cropped to
            the VLM's token grid; None without frames, or if `cached_3d` has its output.
        cached_2d: cache lookup of the vision tower's output; None without a cache of 2D features.
        cached_3d: cache lookup of the geometry features; None without a cache.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    geometry_images: torch.Tensor | None
    cached_2d: CacheLookup | None = None
    cached_3d: CacheLookup | None = None

    def is_outdated(self) -> bool:
        """Whether features that the cache lacked at lookup have been written since."""
        return any(lookup is not None and lookup.is_outdated() for lookup in (self.cached_2d, self.cached_3d))


class VisualPreprocessor:
    """Preprocess a sample's frames for the vision tower and the geometry encoder.

    Args:
        family: VLM family; computes the pixel values of its vision tower.
        vision: patch sizes and normalisation of the VLM.
        geometry: patch size of the geometry encoder.
        config: frame size, and whether frames are images or a video.
        cache: feature cache; None if all features are computed.

    Raises:
        ValueError: `data.frame_width` is not a multiple of the geometry encoder's patch size.
    """

    def __init__(
        self,
        family: VlmFamily,
        vision: VisionSpec,
        geometry: GeometrySpec,
        config: DataConfig,
        cache: FeatureCache | None = None,
    ) -> None:
        if config.frame_width % geometry.patch_size:
            raise ValueError(
                f"data.frame_width is {config.frame_width}; make it a multiple of the geometry encoder's patch size "
                f"{geometry.patch_size}."
            )
        self.family, self.vision, self.geometry = family, vision, geometry
        self.config, self.cache = config, cache
        self.fit = config.frame_width, geometry.patch_size, config.frame_fit  # arguments of `images.scaled_size`
        self._last: tuple[tuple[Path, ...], VisualInputs] | None = None

    def __call__(self, sample: Sample) -> VisualInputs:
        """Inputs of both encoders for a sample's frames; see `compute`.

        The last result is reused for a sample with the same frames: with `data.questions_per_scene`, such samples are
        consecutive. It is computed again if features that it lacked have been cached since.
        """
        if self._last is None or self._last[0] != sample.frames or self._last[1].is_outdated():
            self._last = sample.frames, self.compute(sample)
        return self._last[1]

    def compute(self, sample: Sample) -> VisualInputs:
        """Inputs of both encoders for a sample's frames; an encoder whose features are cached gets no inputs.

        Raises:
            ValueError: a frame cannot be read, or is too small.
        """
        vision = self.vision
        no_patches = torch.zeros(0, 3 * vision.temporal_patch_size * vision.patch_size**2)
        if not sample.frames:
            return VisualInputs(no_patches, torch.zeros(0, 3, dtype=torch.int64), None)
        cached_2d = self.cache.find_2d(sample.frames) if self.cache else None
        cached_3d = self.cache.find_3d(sample.frames) if self.cache else None
        missing = [lookup for lookup in (cached_2d, cached_3d) if lookup is None or lookup.features is None]
        if not missing:
            return VisualInputs(no_patches, self._grid(sample), None, cached_2d, cached_3d)
        images = stack_frames([load_resized(path, *self.fit) for path in sample.frames])
        # The key hashes the frame files, which are read again here. If one was replaced in between, its features would
        # be stored under the old key: start again.
        if any(lookup is not None and not lookup.matches(sample.frames) for lookup in missing):
            return self.compute(sample)
        geometry_images = torch.from_numpy(images) if cached_3d is None or cached_3d.features is None else None
        if cached_2d is not None and cached_2d.features is not None:
            return VisualInputs(no_patches, self._grid(sample), geometry_images, cached_2d, cached_3d)
        self._tower_size(sample.frames, images.shape[3], images.shape[2])
        cropped = even_crop(images, patch=vision.patch_size, merge=vision.merge_size)
        kind = "video" if self.config.visual == "video" else "image"
        return VisualInputs(*self.family.pixel_values(cropped, vision, kind), geometry_images, cached_2d, cached_3d)

    def _grid(self, sample: Sample) -> torch.Tensor:
        """`VisualInputs.grid_thw` from the headers of the frame files; their pixels are not decoded."""
        _, (width, height) = self.sizes(sample.frames)
        rows, columns = height // self.vision.patch_size, width // self.vision.patch_size
        count = len(sample.frames)
        if self.config.visual == "video":
            return torch.tensor([[-(-count // self.vision.temporal_patch_size), rows, columns]])
        return torch.tensor([[1, rows, columns]] * count)

    def sizes(
        self, frames: Sequence[Path], sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(width, height)`` of the resized frames for the geometry encoder, and of their crop for the vision tower.

        Args:
            frames: frame files of a sample.
            sizes: ``(width, height)`` of the frame files in pixels; None to read their headers.

        Raises:
            ValueError: a frame is too narrow, or all frames are smaller than a merged patch of the vision tower; the
                message has the path.
        """
        if sizes is None:
            sizes = [frame_size(path) for path in frames]
        for path, size in zip(frames, sizes, strict=True):
            self.lost_height(path, size)  # raises for a narrow frame
        width, height = fitted_size(sizes, *self.fit)
        return (width, height), self._tower_size(frames, width, height)

    def lost_height(self, frame: Path, size: tuple[int, int]) -> float:
        """Fraction of a frame's height that is cropped.

        Args:
            frame: frame file.
            size: its width and height in pixels.

        Raises:
            ValueError: the frame is too narrow; the message has the path.
        """
        try:
            return lost_height(size, *self.fit)
        except ValueError as error:
            raise ValueError(f"Frame {frame}: {error}") from error

    def _tower_size(self, frames: Sequence[Path], width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` of the vision tower's crop of resized frames."""
        try:
            even_height, even_width = even_size(height, width, self.vision.patch_size, self.vision.merge_size)
        except ValueError as error:
            raise ValueError(f"{frames[0]} and the other frames of its sample: {error}") from error
        return even_width, even_height
