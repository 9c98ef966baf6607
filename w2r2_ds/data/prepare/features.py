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
from w2r2_ds.data.collate import tower_input
from w2r2_ds.data.images import frame_size
from w2r2_ds.data.loader import ReraisingDataLoader, ignore_stop_signals, load_mixture, visual_kind
from w2r2_ds.data.validate import THREADS
from w2r2_ds.data.visual_inputs import VisualInputs, VisualPreprocessor
from w2r2_ds.features.lookup import FeatureCache, flush
from w2r2_ds.features.store import FeatureStore, file_size, gib
from w2r2_ds.kernels.select import describe_attention, resolve_attention, resolve_dtype
from w2r2_ds.models.build import geometry_spec, load_geometry
from w2r2_ds.models.family import find_family
from w2r2_ds.models.feature_identity import open_cache
from w2r2_ds.models.loading import load_config, load_vision_spec, load_vlm
from w2r2_ds.types.batch import moved
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
    """Encode the frame sets of these splits that the cache does not have. An interrupted call can be repeated.

    Collective: every rank calls it, inside `utils.distributed.gloo_process_group`.

    Args:
        config: configuration of the run that will use the cache.
        splits: train, val or both.
        dry_run: only print the number and the size of missing files.
        ranks: the ranks that share the work.

    Raises:
        ValueError: data.cache is empty or has too little space, a frame cannot be read, or a file could not be written.
            Raised on every rank, except for a frame that cannot be decoded: only on the rank that decodes it.
    """
    with raise_on_all_ranks():
        scenes = frame_sets(config, splits)[ranks.rank :: ranks.world_size]
        cache = open_cache(config.data, config.model)
        if cache is None:
            raise ValueError("data.cache is empty; name the folder to fill, as --data.cache runs/cache.")
        vision, geometry = load_vision_spec(config.model.vlm), geometry_spec(config.model.geometry)
        family = find_family(load_config(config.model.vlm).model_type)
        preprocess = VisualPreprocessor(family, vision, geometry, config.data, cache)
        missing, whole, lacking = find_missing(scenes, preprocess, FeatureBytes(config, vision, geometry, cache))
    whole, lacking = sum_over_ranks(whole, ranks), sum_over_ranks(lacking, ranks)
    with raise_on_all_ranks():
        check_space(cache.cache, whole, lacking)
    if ranks.rank == 0:
        dtype = resolve_dtype(config.model.dtype)
        chosen = describe_attention(config.model.attention, dtype)
        print(f"{chosen}, {dtype}: training on other machines finds only what it would choose too", flush=True)
        free = gib(shutil.disk_usage(cache.cache.folder).free)
        print(f"features of data.{', data.'.join(splits)}: {whole}; missing in {cache.cache.folder}: {lacking}", end="")
        print(f" (free: {free}, data.cache_gib {config.data.cache_gib:g})", flush=True)
    if not dry_run and lacking.files:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        made = encode_all(missing, preprocess, config, device, ranks)
        flush()
        with raise_on_all_ranks():  # also a barrier: the size below is that of all ranks' files
            check_written(cache.cache, made)
        if ranks.rank == 0:
            print(f"{cache.cache.folder}: {gib(cache.cache.size())}, complete", flush=True)


def frame_sets(config: RunConfig, splits: Sequence[str]) -> list[Sample]:
    """One sample per distinct ordered set of frames."""
    found: dict[tuple[Path, ...], Sample] = {}
    for split in dict.fromkeys(splits):
        for sample in load_mixture(config.data, split):
            if sample.frames:
                found.setdefault(sample.frames, sample)
    return list(found.values())


class FeatureBytes:
    """Size of feature files, computed from image sizes without decoding."""

    def __init__(self, config: RunConfig, vision: VisionSpec, geometry: GeometrySpec, cache: FeatureCache) -> None:
        self.dtype, self.cache = resolve_dtype(config.model.dtype), cache
        self.vision, self.geometry = vision, geometry
        vlm = load_config(config.model.vlm)
        self.channels_2d = find_family(vlm.model_type).cache_channels(vlm)
        self.as_video = config.data.visual == "video"

    def of(self, sample: Sample, preprocess: VisualPreprocessor) -> tuple[int, int]:
        """Upper bounds, in bytes, of a sample's geometry file and 2D file; 0 if 2D features are not cached."""
        (width, height), (tower_width, tower_height) = preprocess.sizes([frame_size(path) for path in sample.frames])
        count = len(sample.frames)
        shape_3d = (count, *self.geometry.grid(height, width), self.geometry.feature_dim)
        if self.cache.vision is None:
            return file_size(shape_3d, self.dtype), 0
        step = self.vision.patch_size * self.vision.merge_size
        times = -(-count // self.vision.temporal_patch_size) if self.as_video else count
        shape_2d = (times * (tower_height // step) * (tower_width // step), self.channels_2d)
        return file_size(shape_3d, self.dtype), file_size(shape_2d, self.dtype)


def find_missing(
    samples: Sequence[Sample], preprocess: VisualPreprocessor, sizes: FeatureBytes
) -> tuple[list[Sample], FileCount, FileCount]:
    """Samples with missing files, the files of all samples, and the missing files.

    Existing files are read completely, so that damaged ones count as missing.
    """
    cache = sizes.cache

    def one(sample: Sample) -> tuple[FileCount, FileCount]:
        found = [cache.find_3d(sample.frames), cache.find_2d(sample.frames)]
        needs = [
            (each, FileCount(1, size)) for each, size in zip(found, sizes.of(sample, preprocess), strict=True) if each
        ]
        lacking = [need for each, need in needs if each.features is None]
        return sum((need for _, need in needs), FileCount()), sum(lacking, FileCount())

    with ThreadPoolExecutor(THREADS) as pool:
        needs = list(pool.map(one, samples))
    missing = [sample for sample, (_, lacking) in zip(samples, needs, strict=True) if lacking.files]
    return missing, sum((whole for whole, _ in needs), FileCount()), sum((lacking for _, lacking in needs), FileCount())


def sum_over_ranks(need: FileCount, ranks: RankInfo) -> FileCount:
    """Sum of the counts of all ranks. Collective."""
    if ranks.world_size == 1:
        return need
    everyone: list[FileCount] = [need] * ranks.world_size
    dist.all_gather_object(everyone, need)
    return sum(everyone, FileCount())


def check_space(cache: FeatureStore, whole: FileCount, lacking: FileCount) -> None:
    """Raise ``ValueError`` if the features exceed data.cache_gib or the free space, before anything is encoded."""
    if whole.bytes > cache.limit:
        raise ValueError(
            f"The features need {gib(whole.bytes)} ({whole.files} files), more than data.cache_gib = "
            f"{cache.limit / 2**30:.3g}; raise it, or fill the cache for fewer --splits or frames "
            "(of protocol vgllm every sample has its own, of scene_sets samples share them)."
        )
    size, free = cache.size(), shutil.disk_usage(cache.folder).free
    if size + lacking.bytes > cache.limit:
        raise ValueError(
            f"{cache.folder} holds {gib(size)} and the missing features need {gib(lacking.bytes)}, more than "
            f"data.cache_gib = {cache.limit / 2**30:.3g} together; raise it, or delete files of older weights."
        )
    if lacking.bytes > free:
        raise ValueError(
            f"{cache.folder} has {gib(free)} free, but the missing features need {gib(lacking.bytes)}; make room, or "
            "name another folder with data.cache."
        )


def check_written(cache: FeatureStore, made: Sequence[str]) -> None:
    """Raise ``ValueError`` if new files are missing: the cache was full, or a write failed, which is logged."""
    lost = [key for key in made if not cache.has(key)]
    if lost:
        raise ValueError(
            f"{cache.folder} lacks {len(lost)} of the {len(made)} files that were just written (see the "
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
    """Encode and store the missing features of these samples; returns their keys."""
    made: list[str] = []
    geometry = load_geometry(config.model, device)
    set_num_threads(ranks, geometry.spec.feature_dim)
    vlm: Any = None
    family = preprocess.family
    if config.data.cached_features == "geometry+2d":
        dtype = resolve_dtype(config.model.dtype)
        vlm = load_vlm(config.model.vlm, dtype, resolve_attention(config.model.attention, dtype)).eval()
        family.vision_tower(vlm).to(device)  # the language model stays on the CPU
    kind = visual_kind(config.data)
    loader: ReraisingDataLoader[VisualInputs] = ReraisingDataLoader(
        _VisualInputsDataset(samples, preprocess),
        batch_size=1,
        collate_fn=itemgetter(0),
        num_workers=config.data.workers,
        worker_init_fn=ignore_stop_signals,
    )
    label = "features" + (f", rank 0 of {ranks.world_size}" if ranks.world_size > 1 else "")
    with progress(label, len(samples), ranks.rank > 0) as advance, torch.no_grad():
        for inputs in loader:
            if inputs.cached_3d is not None and inputs.geometry_images is not None:
                inputs.cached_3d.write_async(geometry.encode(inputs.geometry_images))
                made.append(inputs.cached_3d.key)
            if inputs.cached_2d is not None and len(inputs.pixel_values):
                visuals = moved(
                    tower_input(kind, inputs.pixel_values, inputs.grid_thw, preprocess.vision, family), device
                )
                inputs.cached_2d.write_async(family.to_cache(family.encode_visuals(vlm, visuals)))
                made.append(inputs.cached_2d.key)
            advance()
    return made
