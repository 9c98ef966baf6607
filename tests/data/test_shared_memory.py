"""The computed need of shared memory against real batches, and the prefetch that follows from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.data import shared_memory
from w2r2_ds.data.loader import feature_sizes, make_collate, make_processor, prompt_loader, train_loader
from w2r2_ds.data.mixture import Mixture
from w2r2_ds.data.sampler import GlobalBatchSampler
from w2r2_ds.data.shared_memory import batch_bytes, choose_prefetch, needed_bytes, sample_bytes
from w2r2_ds.features.lookup import flush_writes
from w2r2_ds.models.build import load_frontend
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.types.batch import map_tensors

TOKENS_BYTES = 2**16
"""Slack per batch: ids, masks, positions and poses of the small samples, which are not part of the need."""


def nbytes(batch: Any) -> int:
    """Bytes of a batch in shared memory: every storage once, also those of cached features."""
    storages: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    map_tensors(batch, add)
    return sum(storages.values())


@pytest.mark.parametrize("cached", ["", "geometry", "geometry+2d"])
@pytest.mark.parametrize("visual", ["images", "video"])
def test_need_of_a_real_batch(
    samples: list[Any], frontend: Any, model_config: Any, data_config: Any, tmp_path: Path, visual: str, cached: str
) -> None:
    """Before and after the features of all frames are cached; the need is the larger of both."""
    config = data_config(visual=visual, cache=str(tmp_path) if cached else "", cached_features=cached or "geometry")
    given = replace(frontend, cache=open_cache(config, model_config))
    processor, collate = make_processor(given, config), make_collate(given, config)
    chosen = [sample for sample in samples if sample.frames][:2]
    sizes = feature_sizes(given)
    needs = [sample_bytes(sample.frames, config, sizes) for sample in chosen]
    features = [processor(sample, True) for sample in chosen]
    found = [nbytes(collate(features))]
    if cached:
        width = given.family.cache_channels(given.meta.config)
        for each in features:
            frames, tokens = len(each.sample.frames), int(each.visual.grid_thw.prod(-1).sum()) // 4
            each.visual.cached_3d.write_async(torch.zeros(frames, 4, 4, given.geometry.feature_dim))
            if each.visual.cached_2d is not None:
                each.visual.cached_2d.write_async(torch.zeros(tokens, width))
        flush_writes()
        visuals = collate([make_processor(given, config)(sample, True) for sample in chosen])
        assert all(lookup.features is not None for lookup in visuals.visuals.cached_3d + visuals.visuals.cached_2d)
        found.append(nbytes(visuals))
    assert max(found) <= sum(needs) + TOKENS_BYTES
    if cached != "geometry+2d":  # with both, the need is that of a sample of which one kind is cached
        assert sum(needs) <= max(found) + TOKENS_BYTES


@pytest.mark.parametrize("visual", ["images", "video"])
def test_point_maps_count(depth_samples: list[Any], model_config: Any, data_config: Any, visual: str) -> None:
    """Besides the frames, which only the vision tower gets."""
    config = data_config(visual=visual)
    given = load_frontend(replace(model_config, geometry=GeometryConfig(name="point_map", reference_frame="camera")))
    processor, collate = make_processor(given, config), make_collate(given, config)
    for sample in depth_samples:
        visuals = collate([processor(sample, True)]).visuals
        found = nbytes((visuals.tower_frames, visuals.geometry_frames))
        assert found > sample_bytes(sample.frames, config)
        assert found == sample_bytes(sample.frames, config, None, given.geometry)
    assert batch_bytes(depth_samples, 2, config, None, given.geometry) > batch_bytes(depth_samples, 2, config)


def test_the_largest_sample_counts(samples: list[Any], data_config: Any) -> None:
    config = data_config()
    sizes = [sample_bytes(sample.frames, config) for sample in samples]
    assert batch_bytes(samples, 3, config) == 3 * max(sizes) > 3 * min(sizes)
    assert batch_bytes([], 3, config) == 0
    assert batch_bytes([replace(samples[0], frames=(Path("missing.jpg"),))], 3, config) == 0


def test_needed_bytes() -> None:
    assert needed_bytes(10, workers=3, prefetch=2, ranks=4) == 10 * 7 * 4
    assert needed_bytes(10, workers=0, prefetch=2, ranks=4) == 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Function that sets the free shared memory, for two ranks on this machine."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    return lambda size: monkeypatch.setattr(shared_memory, "free_bytes", lambda: size)


@pytest.mark.parametrize(("prefetch", "level"), [(5, logging.INFO), (4, logging.WARNING), (1, logging.WARNING)])
def test_prefetch_is_lowered_to_the_free_memory(
    free: Callable[[int], None], caplog: pytest.LogCaptureFixture, prefetch: int, level: int
) -> None:
    caplog.set_level(logging.INFO)
    free(100 * (2 * prefetch + 1) * 2)
    assert choose_prefetch(100, workers=2, prefetch=5) == prefetch
    (record,) = caplog.records
    assert record.levelno == level and "data.prefetch" in record.message and "/dev/shm" in record.message
    assert ("lowered from 5" in record.message) == (prefetch < 5)
    free(0)
    assert choose_prefetch(100, workers=2, prefetch=5) == 1


def test_loaders_are_bounded(samples: list[Any], frontend: Any, data_config: Any, free: Callable[[int], None]) -> None:
    """Training, and prompts of validation and evaluation, whose memory is measured when they start."""
    config = data_config(workers=1, prefetch=4)
    sampler = GlobalBatchSampler(Mixture([samples], [1.0], [0]), 2, 1, rank=0, world_size=1, steps=1)
    for loader, size in (
        (train_loader(samples, frontend, config, sampler), 1),
        (prompt_loader(samples, frontend, config, 2), 2),
    ):
        batch = batch_bytes(samples, size, config)
        for prefetch in (2, 4, 1):
            free(math.ceil(batch * (prefetch + 1) * 2))
            iterator: Iterator[Any] = iter(loader)
            next(iterator)
            assert loader.prefetch_factor == prefetch
            if loader.persistent_workers:
                break
            list(iterator)
