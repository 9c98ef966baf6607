"""Time to read geometry features from the cache and to compute them with VGGT; checks that both are bit-equal."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from w2r2_ds.bench.harness import Case, discard, find_device, interleave, ratio
from w2r2_ds.bench.report import Criterion, Report
from w2r2_ds.bench.shapes import PATCH, Shape, find_shapes
from w2r2_ds.data.images import load_frame, resize_frames
from w2r2_ds.features.key import features_key
from w2r2_ds.features.lookup import Cached, FeatureCache, flush
from w2r2_ds.features.store import Cache
from w2r2_ds.kernels.select import resolve_dtype
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.vggt.model import VGGT
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.types.batch import Batch, moved
from w2r2_ds.utils import atomic_io

VGGT_WAY, READ, DECODE = "VGGT", "read and checksum", "decode and resize, which a hit saves too"
WRITE, FIRST = "write and flush to the disk, once", "digest of the frames, once per process"
SIZE = (640, 480)
"""Width and height of a frame in pixels."""
SHARE = 0.05
"""Maximum time of a read relative to VGGT."""


def geometry_cache(
    shape: str = "cpu", frames: list[int] | None = None, rounds: int = 5, folder: Path | None = None
) -> Report:
    """Seconds per set of frames: computed, and by every part of the cache.

    Args:
        shape: cpu, tiny, or on a GPU 3b or 7b (VGGT-1B at random weights).
        frames: per set, one or several; the shape's own without it.
        rounds: how often each is run, in turns.
        folder: on the disk to measure; the system's place for temporary files without it. What was just written is read
            from the system's memory.
    """
    report = Report("geometry_cache", "seconds per set of frames, processor time unless a GPU computes", [])
    for each in find_shapes(shape, frames or []):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            measure(each, rounds, Path(place), report)
    return report


@dataclass
class Disk:
    """A set of frames with its cache; every method is one thing that is timed."""

    paths: list[Path]
    width: int
    finder: FeatureCache

    def decode(self) -> Tensor:
        """``[frames, 3, height, width]``."""
        return torch.from_numpy(resize_frames([load_frame(path) for path in self.paths], self.width, PATCH))

    def find(self) -> Cached:
        """Look up the features, as the data loader does."""
        return self.finder.find_3d(self.paths)

    def write(self, features: Tensor) -> None:
        """Write the features to a new file."""
        key = features_key(self.finder.geometry, self.paths)
        self.finder.cache.path(key).unlink(missing_ok=True)
        assert self.finder.cache.write(key, features, {}), "there is room"

    def digest(self) -> None:
        """Hash the frames, as a process does the first time it uses them."""
        for path in self.paths:
            atomic_io.digest(path)


def measure(shape: Shape, rounds: int, place: Path, report: Report) -> None:
    """Add one shape's rows and criteria."""
    device, dtype = find_device(), resolve_dtype(shape.dtype)  # type: ignore[arg-type]
    encoder = encoder_of(shape, device, dtype)
    paths = write_frames(place, shape.frames, SIZE)
    disk = Disk(paths, shape.frame_size[0], FeatureCache(Cache(place / "cache", 2**40), "bench"))
    images = disk.decode().to(device)
    features = encoder.encode(images).cpu()
    disk.write(features)
    cases: dict[str, Case] = {
        VGGT_WAY: discard(partial(encoder.encode, images)),
        READ: discard(disk.find),
        DECODE: discard(disk.decode),
        FIRST: discard(disk.digest),
        WRITE: discard(partial(disk.write, features)),
    }
    spreads = interleave(cases, rounds, device, warmups=1)
    mib = features.nbytes / 2**20
    for name, spread in spreads.items():
        moves = name in (READ, WRITE)
        report.rows.append(
            {
                "what": name,
                "shape": f"{shape.name}, {shape.frames} frames, {shape.dtype}",
                "mib": mib if moves else None,
                **spread.columns(),
                "mib/s": mib / spread.median if moves else None,
                "/VGGT": ratio(spread, spreads[VGGT_WAY]),
            }
        )
    where = f"{shape.name}, {shape.frames} frames"
    if shape.name != "tiny":
        claim = f"{where}: a read / VGGT"
        report.criteria.append(Criterion(claim, ratio(spreads[READ], spreads[VGGT_WAY]), SHARE))
    for kind in dict.fromkeys((dtype, torch.bfloat16)):
        claim = f"{where}: values that differ from recomputed ones, {str(kind).removeprefix('torch.')}"
        report.criteria.append(Criterion(claim, differing(encoder_of(shape, device, kind), disk, images), 0))


def encoder_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> VGGTEncoder:
    """VGGT encoder with random weights from a fixed seed."""
    torch.manual_seed(0)
    return VGGTEncoder(VGGT(shape.vggt).to(device, dtype), [shape.geometry_layer])


def differing(encoder: VGGTEncoder, disk: Disk, images: Tensor) -> float:
    """Number of cached values that differ from recomputed ones."""
    disk.write(encoder.encode(images).cpu())
    kept, again = disk.find().features, encoder.encode(images).cpu()
    assert kept is not None and kept.dtype == again.dtype and kept.shape == again.shape, "it was just written"
    return float((kept != again).sum())


ROOM = 2**40
"""Limit of the cache in bytes, more than any case needs."""


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


def write_frames(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write JPEG files of smooth noise, which compresses about as well as photographs."""
    noise = np.random.default_rng(0)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        paths.append(folder / f"{index}.jpg")
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def write_pixels(folder: Path, images: torch.Tensor) -> tuple[Path, ...]:
    """Write one file per frame with its pixel bytes; cache keys hash file contents."""
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"frame{index}.raw")
        paths[-1].write_bytes(image.mul(255).byte().cpu().numpy().tobytes())
    return tuple(paths)
