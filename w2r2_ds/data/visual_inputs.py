"""Preprocess the frames of a sample for the vision tower and the geometry encoder; runs in DataLoader workers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from w2r2_ds.config.schema import DataConfig
from w2r2_ds.data.frames.point_maps import load_point_maps
from w2r2_ds.data.frames.scale_reference import load_scale_reference, scale_files
from w2r2_ds.data.images import (
    Placement,
    fitted_size,
    frame_size,
    load_resized,
    lost_height,
    naming,
    place_frame,
    stack_frames,
)
from w2r2_ds.features.lookup import CacheLookup, FeatureCache
from w2r2_ds.models.family import VlmFamily
from w2r2_ds.models.frame_pixels import even_size
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec
from w2r2_ds.utils.distributed import RankInfo
from w2r2_ds.utils.parallel import threads_per_worker


@dataclass(frozen=True)
class VisualInputs:
    """Frames of one sample for the vision tower and the geometry encoder, or their cached features.

    Attributes:
        tower_frames: ``[frames, 3, height, width]`` uint8, the vision tower's input, not cropped to the VLM's token
            grid; None without frames, or if `cached_2d` has the tower's output.
        grid_thw: ``[images or videos, 3]`` int64 patch grids (time, height, width), also with cached features.
        geometry_frames: the geometry encoder's input: the same tensor as `tower_frames` (except in experiments), or
            point maps ``[frames, rows, columns, points, 3]`` float32. None without frames, or if `cached_3d` has the
            encoder's output.
        scale_reference: metric lengths for the scale hint (`Visuals.scale_reference`); None without a scale hint,
            without frames, or if `cached_3d` has the encoder's output.
        cached_2d: cache lookup of the vision tower's output; None without a cache of 2D features.
        cached_3d: cache lookup of the geometry features; None without a cache.
    """

    tower_frames: torch.Tensor | None
    grid_thw: torch.Tensor
    geometry_frames: torch.Tensor | None
    cached_2d: CacheLookup | None = None
    cached_3d: CacheLookup | None = None
    scale_reference: torch.Tensor | None = None

    def is_outdated(self) -> bool:
        """Whether features that the cache lacked at lookup have been written since."""
        return any(lookup is not None and lookup.is_outdated() for lookup in (self.cached_2d, self.cached_3d))


class VisualPreprocessor:
    """Preprocess a sample's frames for the vision tower and the geometry encoder.

    Args:
        family: VLM family; computes the patch grids of its vision tower.
        vision: patch sizes of the VLM.
        geometry: patch size of the geometry encoder, and the kind of its input.
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
        self.threads = config.decode_threads or threads_per_worker(config.workers, RankInfo.from_environment())
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
        if not sample.frames:
            return VisualInputs(None, torch.zeros(0, 3, dtype=torch.int64), None)
        cached_2d = self.cache.find_2d(sample.frames) if self.cache else None
        cached_3d = self.find_3d(sample.frames)
        if all(lookup is not None and lookup.features is not None for lookup in (cached_2d, cached_3d)):
            # The pixels are not decoded.
            _, tower_size = self.sizes(sample.frames)
            return VisualInputs(None, self._grid(sample, tower_size), None, cached_2d, cached_3d)
        frames = torch.from_numpy(stack_frames(self._load(sample.frames)))
        # The key hashes the frame files, which are read again here. If one was replaced in between, its features would
        # be stored under the old key: start again.
        files = (cached_2d, sample.frames), (cached_3d, self.geometry_files(sample.frames))
        for lookup, names in files:
            if lookup is not None and lookup.features is None and not lookup.matches(names):
                return self.compute(sample)
        width, height = frames.shape[3], frames.shape[2]
        tower_size = self._tower_size(sample.frames, width, height)
        geometry_frames = frames if self.geometry.point_maps is None else self._point_maps(sample.frames, width, height)
        has_3d = cached_3d is not None and cached_3d.features is not None
        needs_reference = self.geometry.scale_hint != "none" and not has_3d
        return VisualInputs(
            tower_frames=frames if cached_2d is None or cached_2d.features is None else None,
            grid_thw=self._grid(sample, tower_size),
            geometry_frames=None if has_3d else geometry_frames,
            cached_2d=cached_2d,
            cached_3d=cached_3d,
            scale_reference=self._scale_reference(sample.frames, width, height) if needs_reference else None,
        )

    def find_3d(self, frames: Sequence[Path]) -> CacheLookup | None:
        """Look up the geometry features of frames; None without a cache."""
        return self.cache.find_3d(self.geometry_files(frames)) if self.cache else None

    def geometry_files(self, frames: Sequence[Path]) -> list[Path]:
        """The files that determine geometry features: the frames, and with a scale hint their depth images or poses."""
        return [*frames, *scale_files(frames, self.geometry)]

    def _load(self, paths: Sequence[Path]) -> list[np.ndarray]:
        """Decoded and resized frames ``uint8 [H, W, 3]``, in order; raises the error of the first bad file."""
        # Pillow releases Python's global lock while it decodes and resizes. The threads end with the sample: a process
        # that forks loader workers later has none of them.
        with ThreadPoolExecutor(min(self.threads, len(paths))) as pool:
            return list(pool.map(lambda path: load_resized(path, *self.fit), paths))

    def _point_maps(self, paths: Sequence[Path], width: int, height: int) -> torch.Tensor:
        """Point maps of frames that were resized and stacked to `width` x `height` pixels."""
        placements = self._placements(paths, width, height)
        return torch.from_numpy(load_point_maps(paths, placements, (width, height), self.geometry, self.threads))

    def _scale_reference(self, paths: Sequence[Path], width: int, height: int) -> torch.Tensor:
        """`VisualInputs.scale_reference` of frames that were resized and stacked to `width` x `height` pixels."""
        placements = self._placements(paths, width, height)
        return torch.from_numpy(load_scale_reference(paths, placements, (width, height), self.geometry, self.threads))

    def _placements(self, paths: Sequence[Path], width: int, height: int) -> list[Placement]:
        return [place_frame(frame_size(path), (width, height), *self.fit) for path in paths]

    def _grid(self, sample: Sample, tower_size: tuple[int, int]) -> torch.Tensor:
        """`VisualInputs.grid_thw` of a sample; `tower_size` is the width and height in pixels of the tower's crop."""
        width, height = tower_size
        kind = "video" if self.config.visual == "video" else "image"
        return self.family.grid_thw(len(sample.frames), height, width, self.vision, kind)

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
        with naming(frame):
            return lost_height(size, *self.fit)

    def _tower_size(self, frames: Sequence[Path], width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` of the vision tower's crop of resized frames."""
        try:
            even_height, even_width = even_size(height, width, self.vision.patch_size, self.vision.merge_size)
        except ValueError as error:
            raise ValueError(f"{frames[0]} and the other frames of its sample: {error}") from error
        return even_width, even_height
