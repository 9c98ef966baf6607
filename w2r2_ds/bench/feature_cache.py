"""Time to read geometry features from the feature cache relative to computing them; checks that both are bit-equal."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from w2r2_ds.bench.harness import Case, find_device, interleave, time_ratio
from w2r2_ds.bench.report import BenchReport, Criterion
from w2r2_ds.bench.shapes import PATCH, Shape, find_shapes
from w2r2_ds.data.images import load_resized, stack_frames
from w2r2_ds.features.key import features_key
from w2r2_ds.features.lookup import CacheLookup, FeatureCache, flush_writes
from w2r2_ds.features.store import FeatureStore
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch, to_device
from w2r2_ds.utils.files import atomic_io

COMPUTE, READ, DECODE = "VGGT", "read and verify checksum", "decode and resize, which a cache hit skips too"
HASH, WRITE = "hash the frames, once per process", "write and fsync, once"
FRAME_SIZE = (640, 480)
"""Width and height of a JPEG frame in pixels."""
MAX_RATIO = 0.05
"""Maximum time of a read relative to VGGT."""
CACHE_BYTES = 2**40
"""Size limit of the cache in bytes, more than any case needs."""


def run(shape_name: str, frames: list[int] | None, rounds: int, folder: Path | None) -> BenchReport:
    """Time VGGT and every operation of the cache, for every number of frames.

    Args:
        shape_name, frames: see `find_shapes`.
        rounds: number of runs per case, interleaved.
        folder: parent of the cache's temporary folder; None for the system's.
    """
    device = find_device()  # first, because the report records the number of threads
    report = BenchReport("feature_cache", "seconds per set of frames, CPU time unless VGGT runs on a GPU", [])
    for shape in find_shapes(shape_name, frames):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            measure(shape, device, rounds, Path(temporary), report)
    return report


@dataclass
class FrameSet:
    """Frames on disk and the cache of their features; every method is one timed operation.

    Attributes:
        paths: files of the frames.
        width: width in pixels to which frames are resized.
        lookup: the feature cache.
    """

    paths: list[Path]
    width: int
    lookup: FeatureCache

    def decode(self) -> Tensor:
        """Decode and resize the frames: ``[frames, 3, height, width]`` uint8."""
        return torch.from_numpy(stack_frames([load_resized(path, self.width, PATCH) for path in self.paths]))

    def read(self) -> CacheLookup:
        """Look up the features, as the data loader does."""
        return self.lookup.find_3d(self.paths)

    def write(self, features: Tensor) -> None:
        """Write the features to a new file."""
        key = features_key(self.lookup.geometry, self.paths)
        self.lookup.store.path(key).unlink(missing_ok=True)
        assert self.lookup.store.write(key, features, {}), "the cache is below its size limit"

    def hash(self) -> None:
        """Hash the frames, as every process does once for the cache keys."""
        for path in self.paths:
            atomic_io.digest(path)


def measure(shape: Shape, device: torch.device, rounds: int, folder: Path, report: BenchReport) -> None:
    """Add one shape's rows and criteria to the report."""
    dtype = resolve_dtype(shape.dtype)  # type: ignore[arg-type]
    encoder = build_encoder(shape, device, dtype)
    paths = write_frames(folder, shape.frames, FRAME_SIZE)
    frames = FrameSet(paths, shape.frame_size[0], FeatureCache(FeatureStore(folder / "cache", CACHE_BYTES), "bench"))
    images = unit_range(frames.decode().to(device))
    features = encoder.encode(images).cpu()
    frames.write(features)
    cases: dict[str, Case] = {
        COMPUTE: partial(encoder.encode, images),
        READ: frames.read,
        DECODE: frames.decode,
        HASH: frames.hash,
        WRITE: partial(frames.write, features),
    }
    spreads = interleave(cases, rounds, device, warmups=1)
    mib = features.nbytes / 2**20
    for name, spread in spreads.items():
        transfers = name in (READ, WRITE)
        report.rows.append(
            {
                "operation": name,
                "shape": f"{shape.label}, {shape.dtype}",
                "mib": mib if transfers else None,
                **spread.columns(),
                "mib/s": mib / spread.median if transfers else None,
                "/VGGT": time_ratio(spread, spreads[COMPUTE]),
            }
        )
    if shape.name != "tiny":
        claim = f"{shape.label}: read / VGGT"
        report.criteria.append(Criterion(claim, time_ratio(spreads[READ], spreads[COMPUTE]), MAX_RATIO))
    for checked_dtype in dict.fromkeys((dtype, torch.bfloat16)):
        claim = f"{shape.label}: values that differ from recomputed ones, {str(checked_dtype).removeprefix('torch.')}"
        differing = count_differing(build_encoder(shape, device, checked_dtype), frames, images)
        report.criteria.append(Criterion(claim, differing, 0))


def build_encoder(shape: Shape, device: torch.device, dtype: torch.dtype) -> VGGTEncoder:
    """VGGT encoder with random weights from a fixed seed."""
    torch.manual_seed(0)
    return VGGTEncoder(VGGT(shape.vggt).to(device, dtype), [shape.geometry_layer])


def count_differing(encoder: VGGTEncoder, frames: FrameSet, images: Tensor) -> float:
    """Number of cached values that differ from recomputed ones."""
    frames.write(encoder.encode(images).cpu())
    cached, recomputed = frames.read().features, encoder.encode(images).cpu()
    assert cached is not None and cached.dtype == recomputed.dtype and cached.shape == recomputed.shape, "just written"
    return float((cached != recomputed).sum())


class CachedFeatures:
    """A feature cache in a temporary folder, with the features of both encoders for a batch of one frame set.

    Args:
        model: model that computes the features.
        batch: a batch with frames, not with cached features.

    Attributes:
        visual: output of the vision tower.
        geometry: features of VGGT ``[frames, rows, columns, channels]``.
    """

    def __init__(self, model: W2R2, batch: Batch) -> None:
        (images,) = batch.visuals.geometry_frames
        assert images is not None, "the batch has frames, not cached features"
        self.folder = tempfile.TemporaryDirectory()
        self.paths = write_pixels(Path(self.folder.name), images)
        self.cache = FeatureCache(FeatureStore(Path(self.folder.name) / "cache", CACHE_BYTES), "geometry", "vision")
        self.visual, self.geometry = model.encode_2d(batch.visuals), model.encode_3d(batch.visuals)[0]
        cached_2d, cached_3d = self.cache.find_2d(self.paths), self.cache.find_3d(self.paths)
        assert cached_2d is not None, "the cache has an identity of the vision tower"
        cached_2d.write_async(torch.cat(self.visual.pooler_output))
        cached_3d.write_async(self.geometry)
        flush_writes()

    def into(self, batch: Batch, both: bool) -> Batch:
        """Replace the images of a batch of the same frames by cached geometry features; with `both`, also by 2D ones.

        The features are read from disk, as the data loader does.
        """
        visuals = replace(batch.visuals, geometry_frames=(None,), cached_3d=(self.cache.find_3d(self.paths),))
        if both:
            cached_2d = self.cache.find_2d(self.paths)
            assert cached_2d is not None, "the cache has an identity of the vision tower"
            visuals = replace(visuals, tower_frames=(), cached_2d=(cached_2d,), uncached=(None,))
        return replace(batch, visuals=to_device(visuals, batch.input_ids.device))


def write_frames(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write JPEG files of smooth noise, which compresses about as well as photographs."""
    noise = np.random.default_rng(0)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        paths.append(folder / f"{index}.jpg")
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def write_pixels(folder: Path, images: Tensor) -> tuple[Path, ...]:
    """Write one file per frame with its pixel bytes; cache keys hash file contents."""
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"frame{index}.raw")
        paths[-1].write_bytes(image.cpu().numpy().tobytes())
    return tuple(paths)
