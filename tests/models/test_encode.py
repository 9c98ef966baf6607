"""Cached features equal computed ones; only uncached features are computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from w2r2_ds.config.schema import DataConfig, ModelConfig
from w2r2_ds.data import visual_inputs
from w2r2_ds.data.loader import make_collate, make_processor, prompt_loader
from w2r2_ds.evaluation.conditions import find_condition
from w2r2_ds.evaluation.runner import Answerer
from w2r2_ds.evaluation.shuffle import ShuffledGeometry
from w2r2_ds.features.lookup import flush_writes
from w2r2_ds.features.store import FeatureStore
from w2r2_ds.models.build import VlmFrontend, build_model
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.w2r2 import W2R2, num_tower_calls
from w2r2_ds.training.cache_stats import cache_use, describe_cache
from w2r2_ds.training.throughput import geometry_flops, vision_flops

BOTH: dict[str, Any] = {"cached_features": "geometry+2d"}


@pytest.fixture(scope="module")
def models(model_config: ModelConfig) -> dict[str, W2R2]:
    """The tiny model in both precisions."""
    configs = {name: replace(model_config, dtype=name) for name in ("float32", "bfloat16")}  # type: ignore[arg-type]
    return {name: build_model(config, torch.device("cpu"), 0).eval() for name, config in configs.items()}


@pytest.fixture
def loaded(frontend: VlmFrontend, model_config: ModelConfig, data_config: Any, tmp_path: Path) -> Callable[..., Any]:
    """`loaded(samples, dtype, **changes)`: a training batch, with a cache in the test's folder."""

    def make(chosen: Sequence[Any], dtype: Any = "float32", cached: str = "geometry", **changes: Any) -> Any:
        config = data_config(**{"cache": str(tmp_path / "cache"), "cached_features": cached, **changes})
        with_cache = replace(frontend, cache=open_cache(config, replace(model_config, dtype=dtype)))
        processor = make_processor(with_cache, config)
        return make_collate(with_cache, config, False)([processor(sample, True) for sample in chosen])

    return make


@pytest.fixture
def calls(models: dict[str, W2R2], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Number of calls of both encoders since the test began, ``"2d"`` and ``"3d"``."""
    counted = {"2d": 0, "3d": 0}

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            counted[name] += 1
            return real(*args, **given)

        return call

    for model in models.values():
        tower = model.base.model.visual
        monkeypatch.setattr(model.geometry, "encode", counting("3d", model.geometry.encode))
        monkeypatch.setattr(tower, "forward", counting("2d", tower.forward))
    return counted


def same(one: Any, other: Any) -> bool:
    """Whether two sequences of tensors are equal, bit for bit."""
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other))  # noqa: B905


@pytest.mark.parametrize("visual", ["images", "video"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_bit_equal_with_an_empty_a_filled_and_no_cache(
    samples: list[Any],
    models: dict[str, W2R2],
    loaded: Callable[..., Any],
    calls: dict[str, int],
    dtype: str,
    visual: str,
) -> None:
    model = models[dtype]
    plain = loaded(samples, dtype, cache="", visual=visual)
    one_by_one = [model.encode_2d(loaded([sample], dtype, cache="", visual=visual).visuals) for sample in samples]
    expected_2d = [tokens for visual in one_by_one for tokens in visual.pooler_output]
    expected_3d = model.encode_3d(plain.visuals)
    for name, made in (("cold", (6, 6)), ("warm", (6, 6))):
        batch = loaded(samples, dtype, visual=visual, **BOTH)
        assert same(model.encode_3d(batch.visuals), expected_3d), name
        assert same(model.encode_2d(batch.visuals).pooler_output, expected_2d), name
        flush_writes()
        assert (calls["2d"], calls["3d"]) == made, name
        assert torch.equal(batch.position_ids, plain.position_ids) and batch.visuals.sizes == plain.visuals.sizes
        assert torch.equal(batch.visuals.grid_thw, plain.visuals.grid_thw)
    # With all features cached, no frame is decoded and the batch has no pixels.
    assert batch.visuals.geometry_frames == (None,) * 3 and batch.visuals.uncached == (None,) * 3
    assert batch.visuals.tower_frames == ()


def test_2d_features_are_computed_in_one_call_if_only_geometry_is_cached(
    samples: list[Any], models: dict[str, W2R2], loaded: Callable[..., Any], calls: dict[str, int]
) -> None:
    model = models["float32"]
    plain = model.encode_2d(loaded(samples, cache="").visuals).pooler_output
    model.encode_3d(loaded(samples).visuals)
    flush_writes()
    warm = loaded(samples).visuals
    assert calls["3d"] == 3 and same(model.encode_2d(warm).pooler_output, plain) and calls["2d"] == 2
    model.encode_3d(warm)
    assert calls["3d"] == 3


def test_packed_samples_share_the_cached_features_of_their_frames(
    samples: list[Any], models: dict[str, W2R2], loaded: Callable[..., Any], calls: dict[str, int]
) -> None:
    model, packed = models["float32"], {"questions_per_scene": 2}
    chosen = [samples[0], replace(samples[0], id="again"), samples[2]]
    plain = loaded(chosen, cache="", **packed)
    expected = model.encode_3d(plain.visuals), model.encode_2d(plain.visuals).pooler_output
    for made in (2, 0):
        before, batch = dict(calls), loaded(chosen, **packed, **BOTH)
        assert len(batch.visuals.cached_3d) == 2 and torch.equal(batch.frame_set_of_token, plain.frame_set_of_token)
        assert torch.equal(batch.position_ids, plain.position_ids) and torch.equal(
            batch.frame_set_of_sample, plain.frame_set_of_sample
        )
        assert same(model.encode_3d(batch.visuals), expected[0])
        assert same(model.encode_2d(batch.visuals).pooler_output, expected[1])
        assert (calls["3d"] - before["3d"], calls["2d"] - before["2d"]) == (made, made)
        flush_writes()


def test_cached_features_have_no_flops(samples: list[Any], models: dict[str, W2R2], loaded: Callable[..., Any]) -> None:
    model = models["float32"]
    plain = loaded(samples, cache="").visuals
    cold = loaded(samples, **BOTH).visuals
    assert geometry_flops(model.geometry, cold) == geometry_flops(model.geometry, plain) > 0
    assert vision_flops(model, cold) == pytest.approx(vision_flops(model, plain)) and vision_flops(model, plain) > 0
    model.encode_3d(cold), model.encode_2d(cold)
    flush_writes()
    warm = loaded(samples, **BOTH).visuals
    assert geometry_flops(model.geometry, warm) == vision_flops(model, warm) == 0


def test_a_cache_folder_without_read_permission_is_no_error(
    samples: list[Any], loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(cache: FeatureStore) -> int:
        raise PermissionError(13, "Permission denied", "another's")

    monkeypatch.setattr(FeatureStore, "size", fail)
    assert cache_use([loaded(samples)]) == {"cache_hits": 0}
    assert describe_cache(FeatureStore(tmp_path, 2**30)).endswith(": size unknown, another's cannot be listed")


def test_a_limit_above_the_free_space_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is filled during training has no size check, and a full disk would end the run."""
    for free, lines in ((2**30, 1), (2**29, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        logged = describe_cache(FeatureStore(tmp_path, 2**30)).splitlines()
        assert (
            logged[0] == f"feature cache {tmp_path}: 0 GiB of at most 1 GiB (data.cache_gib), {free / 2**30:g} GiB free"
        )
        assert len(logged) == lines and all("data.cache_gib" in line for line in logged[1:])


def test_only_missing_features_are_computed(
    samples: list[Any], models: dict[str, W2R2], loaded: Callable[..., Any], calls: dict[str, int]
) -> None:
    model = models["float32"]
    for sample in samples[:2]:
        visuals = loaded([sample], **BOTH).visuals
        model.encode_2d(visuals), model.encode_3d(visuals)
    flush_writes()
    mixed = loaded(samples, **BOTH)
    known = mixed.visuals.cached_3d[0]
    known.store.path(known.key).unlink()
    mixed = loaded(samples, **BOTH)
    before = dict(calls)
    assert [images is None for images in mixed.visuals.geometry_frames] == [False, True, False]
    assert [inputs is None for inputs in mixed.visuals.uncached] == [True, True, False]
    features = model.encode_3d(mixed.visuals), model.encode_2d(mixed.visuals).pooler_output
    assert calls["3d"] - before["3d"] == 2 and calls["2d"] - before["2d"] == 1 == num_tower_calls(mixed.visuals)
    flush_writes()
    assert same(features[0], model.encode_3d(loaded(samples, **BOTH).visuals))
    assert same(features[1], model.encode_2d(loaded(samples, **BOTH).visuals).pooler_output)


def test_additional_tower_calls_do_not_change_the_features(
    samples: list[Any],
    text_samples: list[Any],
    models: dict[str, W2R2],
    loaded: Callable[..., Any],
    calls: dict[str, int],
) -> None:
    """Under ZeRO-3 all ranks call the tower equally often; the additional calls run on the dummy."""
    model = models["float32"]
    cold = loaded(samples, **BOTH).visuals
    assert num_tower_calls(cold) == 3
    first = model.encode_2d(cold, min_calls=3).pooler_output
    flush_writes()
    assert calls["2d"] == 3
    warm = loaded(samples, **BOTH).visuals
    assert num_tower_calls(warm) == 0
    assert same(model.encode_2d(warm, min_calls=2).pooler_output, first) and calls["2d"] == 5
    nothing = loaded(text_samples, **BOTH).visuals  # a batch without frames calls it for its own dummy
    assert nothing.dummy and num_tower_calls(nothing) == 1
    model.encode_2d(nothing, min_calls=3)
    assert calls["2d"] == 8


def test_dataloader_workers_read_the_cache(
    samples: list[Any],
    frontend: VlmFrontend,
    model_config: ModelConfig,
    models: dict[str, W2R2],
    data_config: Any,
    tmp_path: Any,
) -> None:
    """Features are unchanged by the transfer through shared memory."""
    model = models["float32"]
    config: DataConfig = data_config(cache=str(tmp_path), cached_features="geometry+2d", workers=2)
    with_cache = replace(frontend, cache=open_cache(config, model_config))
    made = []
    for _ in range(2):
        made.append([])
        for batch in prompt_loader(samples, with_cache, config, 1):
            made[-1].append([*model.encode_3d(batch.visuals), *model.encode_2d(batch.visuals).pooler_output])
        flush_writes()
    assert batch.visuals.geometry_frames == (None,)
    assert all(same(cold, warm) for cold, warm in zip(*made, strict=True))


def test_a_frame_that_is_replaced_while_it_is_read_does_not_spoil_the_cache(
    samples: list[Any],
    models: dict[str, W2R2],
    loaded: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The features of the new frame must not be stored under the key of the old one."""
    paths = [Path(shutil.copy(path, tmp_path / path.name)) for path in samples[0].frames]
    moved = replace(samples[0], frames=tuple(paths))
    real = visual_inputs.load_resized

    def replaced_before(path: Path, *fit: Any) -> Any:
        monkeypatch.setattr(visual_inputs, "load_resized", real)
        shutil.copy(samples[0].frames[1], paths[0])
        return real(path, *fit)

    monkeypatch.setattr(visual_inputs, "load_resized", replaced_before)
    (cold,) = models["float32"].encode_3d(loaded([moved]).visuals)
    flush_writes()
    (uncached,) = models["float32"].encode_3d(loaded([moved], cache="").visuals)
    assert torch.equal(cold, uncached)
    shutil.copy(samples[0].frames[0], paths[0])  # the old content again, and with it the old key
    assert loaded([moved]).visuals.cached_3d[0].features is None


def test_shuffled_geometry_does_not_use_the_cache(
    samples: list[Any], frontend: VlmFrontend, model_config: ModelConfig, data_config: Any, tmp_path: Path
) -> None:
    rooms = [replace(sample, scene_id=f"scene000{index}_00") for index, sample in enumerate(samples[:2])]
    config = data_config(cache=str(tmp_path))
    with_cache = replace(frontend, cache=open_cache(config, model_config))
    with pytest.raises(AssertionError, match="no feature cache"):
        ShuffledGeometry(make_processor(with_cache, config), with_cache.geometry, rooms)(rooms[0], False)
    features = ShuffledGeometry(make_processor(frontend, config), frontend.geometry, rooms)(rooms[0], False)
    assert features.visual.cached_3d is None and features.visual.cached_2d is None


@pytest.mark.slow
def test_evaluation_uses_the_cache_except_with_shuffled_geometry(
    samples: list[Any],
    frontend: VlmFrontend,
    model_config: ModelConfig,
    models: dict[str, W2R2],
    data_config: Any,
    calls: dict[str, int],
    tmp_path: Path,
) -> None:
    """In inference mode. Shuffled geometry is the same with and without a cache, and none of it is stored."""
    model, cache = models["float32"], tmp_path / "cache"
    rooms = [replace(sample, scene_id=f"scene000{index}_00") for index, sample in enumerate(samples)]
    given: list[list[torch.Tensor]] = []
    real = model.merge
    model.merge = lambda features: (given.append(features), real(features))[1]  # type: ignore[method-assign]

    def answered(geometry: str, folder: str) -> tuple[list[Any], list[torch.Tensor]]:
        config = data_config(cache=folder, cached_features="geometry+2d")
        with_cache = replace(frontend, cache=open_cache(config, model_config))
        given.clear()
        records = list(Answerer(model, with_cache, config, find_condition(geometry), rooms, 2, 3).records(rooms))
        flush_writes()
        return records, [features for batch in given for features in batch]

    try:
        plain, expected = answered("fused", "")
        swapped, others = answered("shuffle", "")
        cold, warm = answered("fused", str(cache)), answered("fused", str(cache))
        before, made = sorted(cache.rglob("*.safetensors")), dict(calls)
        again = answered("shuffle", str(cache))
    finally:
        del model.merge
    assert cold[0] == plain == warm[0] and same(cold[1], expected) and same(warm[1], expected)
    assert len(before) == 6 and made["3d"] == 9  # plain, swapped, cold
    assert again[0] == swapped and same(again[1], others) and calls["3d"] == 12
    assert not any(torch.equal(one, other) for one, other in zip(others, expected, strict=True))
    assert sorted(cache.rglob("*.safetensors")) == before
