"""Fill the feature cache before training, in one process or many: ``launchers/prepare.py geometry``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.data.batching.collate import tower_input
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.images import THREADS
from w2r2_ds.data.loader import visual_kind
from w2r2_ds.data.reraising_loader import ReraisingDataLoader, ignore_stop_signals
from w2r2_ds.data.shared_memory import batch_bytes
from w2r2_ds.data.validate import read_sizes, warn_of_crop
from w2r2_ds.data.visual_inputs import VisualInputs, VisualPreprocessor
from w2r2_ds.features.lookup import FeatureCache, flush_writes
from w2r2_ds.features.store import FeatureStore, file_size, gib
from w2r2_ds.kernels.select import describe_attention, resolve_attention, resolve_dtype
from w2r2_ds.models.build import load_geometry
from w2r2_ds.models.family import find_family
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.weights.loading import load_model_config, load_vision_spec, load_vlm
from w2r2_ds.types.batch import to_device
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.types.sample import Sample
from w2r2_ds.types.vision import VisionSpec
from w2r2_ds.utils.distributed import RankInfo, raise_on_all_ranks
from w2r2_ds.utils.parallel import set_num_threads
from w2r2_ds.utils.plugins import ImportsPlugins
from w2r2_ds.utils.progress import progress


@dataclass(frozen=True)
class FileCount:
    """Number of feature files, and an upper bound of their bytes."""

    files: int = 0
    bytes: int = 0

    def __add__(self, other: FileCount) -> FileCount:
        return FileCount(self.files + other.files, self.bytes + other.bytes)

    def __str__(self) -> str:
        return f"{self.files} files, {gib(self.bytes)}"


def fill_cache(config: RunConfig, splits: Sequence[str], dry_run: bool, ranks: RankInfo) -> None:
    """Compute the features of the splits' frame sets that the cache lacks; continues an interrupted call.

    Collective: every rank calls it, inside `utils.distributed.gloo_process_group`.

    Args:
        config: configuration of the run that will use the cache.
        splits: train, val or both.
        dry_run: only print the number and the size of missing files.
        ranks: this rank and the number of ranks that share the work.

    Raises:
        ValueError: data.cache is empty or has too little space, a frame cannot be read, or a file could not be written.
            Raised on every rank, except for a frame that cannot be decoded: only on the rank that decodes it.
    """
    with raise_on_all_ranks():
        samples = frame_sets(config, splits)[ranks.rank :: ranks.world_size]  # a part of the work per rank
        cache = open_cache(config.data, config.model)
        if cache is None:
            raise ValueError("data.cache is empty; pass the folder to fill, such as --data.cache runs/cache.")
        vision, geometry = load_vision_spec(config.model.vlm), geometry_spec(config.model.geometry)
        family = find_family(load_model_config(config.model.vlm).model_type)
        preprocess = VisualPreprocessor(family, vision, geometry, config.data, cache)
        warn_of_crop(read_sizes(samples), preprocess)
        todo, total, missing = find_missing(samples, preprocess, FeatureSizes(config, vision, geometry, cache))
    # From here on, the counts are those of all ranks, so every rank takes the same branches.
    total, missing = sum_over_ranks(total, ranks), sum_over_ranks(missing, ranks)
    with raise_on_all_ranks():
        check_space(cache.store, total, missing)
    if ranks.rank == 0:
        dtype = resolve_dtype(config.model.dtype)
        attention = describe_attention(config.model.attention, dtype)
        print(f"{attention}, {dtype}: a run with another attention or dtype computes its own features", flush=True)
        free = gib(shutil.disk_usage(cache.store.folder).free)
        print(f"features of data.{', data.'.join(splits)}: {total}; missing in {cache.store.folder}: {missing}", end="")
        print(f" (free: {free}, data.cache_gib {config.data.cache_gib:g})", flush=True)
    if not dry_run and missing.files:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        keys = encode_all(todo, preprocess, config, device, ranks)
        flush_writes()
        with raise_on_all_ranks():  # also a barrier: the size below is that of all ranks' files
            check_written(cache.store, keys)
        if ranks.rank == 0:
            print(f"{cache.store.folder}: {gib(cache.store.size())}, complete", flush=True)


def frame_sets(config: RunConfig, splits: Sequence[str]) -> list[Sample]:
    """One sample per distinct ordered set of frames."""
    found: dict[tuple[Path, ...], Sample] = {}
    for split in dict.fromkeys(splits):
        for sample in load_mixture(config.data, split):
            if sample.frames:
                found.setdefault(sample.frames, sample)
    return list(found.values())


class FeatureSizes:
    """Sizes of feature files, computed from the sizes of the images without decoding them."""

    def __init__(self, config: RunConfig, vision: VisionSpec, geometry: GeometrySpec, cache: FeatureCache) -> None:
        self.dtype, self.cache = resolve_dtype(config.model.dtype), cache
        self.vision, self.geometry = vision, geometry
        vlm = load_model_config(config.model.vlm)
        self.channels_2d = find_family(vlm.model_type).cache_channels(vlm)
        self.as_video = config.data.visual == "video"

    def upper_bounds(self, sample: Sample, preprocess: VisualPreprocessor) -> tuple[int, int]:
        """Upper bounds, in bytes, of a sample's geometry file and 2D file (0 if 2D features are not cached)."""
        (width, height), (tower_width, tower_height) = preprocess.sizes(sample.frames)
        count = len(sample.frames)
        shape_3d = (count, *self.geometry.grid(height, width), self.geometry.feature_dim)
        if self.cache.vision is None:
            return file_size(shape_3d, self.dtype), 0
        side = self.vision.patch_size * self.vision.merge_size  # of one token, in pixels
        times = -(-count // self.vision.temporal_patch_size) if self.as_video else count
        shape_2d = (times * (tower_height // side) * (tower_width // side), self.channels_2d)
        return file_size(shape_3d, self.dtype), file_size(shape_2d, self.dtype)


def geometry_inputs(inputs: VisualInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments of `GeometryEncoder.encode_frames` for inputs without cached geometry features."""
    assert inputs.geometry_frames is not None, "the features are not cached"
    return inputs.geometry_frames, inputs.scale_reference


def find_missing(
    samples: Sequence[Sample], preprocess: VisualPreprocessor, sizes: FeatureSizes
) -> tuple[list[Sample], FileCount, FileCount]:
    """Samples with missing files, the files of all samples, and the missing files.

    Existing files are read completely, so that damaged ones count as missing.
    """
    cache = sizes.cache

    def count(sample: Sample) -> tuple[FileCount, FileCount]:
        """All files and missing files of one sample."""
        total = missing = FileCount()
        lookups = (preprocess.find_3d(sample.frames), cache.find_2d(sample.frames))
        for lookup, size in zip(lookups, sizes.upper_bounds(sample, preprocess), strict=True):
            if lookup is not None:  # None: 2D features are not cached
                total += FileCount(1, size)
                missing += FileCount(1, size) if lookup.features is None else FileCount()
        return total, missing

    with ThreadPoolExecutor(THREADS) as pool:  # threads: the work is to read files
        counts = list(pool.map(count, samples))
    todo = [sample for sample, (_, missing) in zip(samples, counts, strict=True) if missing.files]
    return todo, sum((total for total, _ in counts), FileCount()), sum((missing for _, missing in counts), FileCount())


def sum_over_ranks(count: FileCount, ranks: RankInfo) -> FileCount:
    """Sum of the counts of all ranks. Collective."""
    if ranks.world_size == 1:
        return count
    counts = [count] * ranks.world_size
    dist.all_gather_object(counts, count)
    return sum(counts, FileCount())


def check_space(cache: FeatureStore, total: FileCount, missing: FileCount) -> None:
    """Raise ``ValueError`` if the features exceed data.cache_gib or the free space, before any is computed.

    Args:
        cache: the cache on disk.
        total: features of the chosen splits.
        missing: those of them that the cache lacks.
    """
    if total.bytes > cache.limit:
        raise ValueError(
            f"The features need {gib(total.bytes)} ({total.files} files), more than data.cache_gib = "
            f"{cache.limit / 2**30:.3g}; raise it, or fill the cache for fewer --splits or frames (with "
            "frames.protocol vgllm every sample has its own frames, with scene_sets samples share them)."
        )
    # The cache may also hold features of other splits, models or frame widths.
    size, free = cache.size(), shutil.disk_usage(cache.folder).free
    if size + missing.bytes > cache.limit:
        raise ValueError(
            f"{cache.folder} holds {gib(size)} and the missing features need {gib(missing.bytes)}, more than "
            f"data.cache_gib = {cache.limit / 2**30:.3g} together; raise it, or delete files of older weights."
        )
    if missing.bytes > free:
        raise ValueError(
            f"{cache.folder} has {gib(free)} free, but the missing features need {gib(missing.bytes)}; make room, or "
            "pass another folder as data.cache."
        )


def check_written(cache: FeatureStore, keys: Sequence[str]) -> None:
    """Raise ``ValueError`` if files of these keys are missing: the cache was full, or a write failed (logged)."""
    lost = [key for key in keys if not cache.has(key)]
    if lost:
        raise ValueError(
            f"{cache.folder} lacks {len(lost)} of the {len(keys)} files that were just written (see the "
            "warning above); free space or raise data.cache_gib, and repeat the command."
        )


class _VisualInputsDataset(ImportsPlugins, Dataset[VisualInputs]):
    """Vision inputs of samples, computed on access."""

    def __init__(self, samples: Sequence[Sample], preprocess: VisualPreprocessor) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> VisualInputs:
        return self.preprocess.compute(self.samples[index])


def encode_all(
    samples: Sequence[Sample], preprocess: VisualPreprocessor, config: RunConfig, device: torch.device, ranks: RankInfo
) -> list[str]:
    """Compute and store the missing features of these samples; returns their keys."""
    keys: list[str] = []
    geometry = load_geometry(config.model, device)
    set_num_threads(ranks, geometry.spec.feature_dim)
    vlm: Any = None
    family = preprocess.family
    if config.data.cached_features == "geometry+2d":
        dtype = resolve_dtype(config.model.dtype)
        vlm = load_vlm(config.model.vlm, dtype, resolve_attention(config.model.attention, dtype)).eval()
        family.vision_tower(vlm).to(device)  # the language model stays on the CPU
    kind = visual_kind(config.data)
    # One sample per batch. Loader workers decode and resize the frames of the next samples meanwhile.
    loader: ReraisingDataLoader[VisualInputs] = ReraisingDataLoader(
        _VisualInputsDataset(samples, preprocess),
        batch_size=1,
        collate_fn=itemgetter(0),
        num_workers=config.data.workers,
        worker_init_fn=ignore_stop_signals,
        prefetch=config.data.prefetch,
        batch_bytes=batch_bytes(samples, 1, config.data),
    )
    label = "features" + (f", rank 0 of {ranks.world_size}" if ranks.world_size > 1 else "")
    with progress(label, len(samples), ranks.rank > 0) as advance, torch.no_grad():
        for inputs in loader:
            # The frames are present only if the features were missing when the loader worker searched the cache.
            if inputs.cached_3d is not None and inputs.geometry_frames is not None:
                inputs.cached_3d.write_async(geometry.encode_frames(*to_device(geometry_inputs(inputs), device)))
                keys.append(inputs.cached_3d.key)
            if inputs.cached_2d is not None and inputs.tower_frames is not None:
                visuals = to_device(
                    tower_input(kind, [inputs.tower_frames], inputs.grid_thw, preprocess.vision, family), device
                )
                inputs.cached_2d.write_async(family.to_cache(family.encode_visuals(vlm, visuals)))
                keys.append(inputs.cached_2d.key)
            advance()
    return keys
