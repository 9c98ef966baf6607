"""A model with scale hint: loader, training step, cache, shuffled geometry, files of the merger."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from depth_scenes import with_depth
from objectives import objective_config
from w2r2_ds.config.schema import GeometryConfig, ModelConfig, RunConfig
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.data.prepare.features import encode_all
from w2r2_ds.data.shared_memory import point_map_bytes
from w2r2_ds.data.validate import check_geometry_files
from w2r2_ds.evaluation.shuffle import ShuffledGeometry
from w2r2_ds.features.lookup import flush_writes
from w2r2_ds.models.build import build_model, fingerprint, load_frontend
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.geometry.encoder import geometry_spec
from w2r2_ds.models.merger_io import load_merger, merger_tensors
from w2r2_ds.models.vggt.scale_hint import CHANNELS
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.utils.distributed import RankInfo


@pytest.fixture(scope="module")
def hint_config(model_config: Any, hint_vggt: Path) -> ModelConfig:
    geometry = GeometryConfig(path=str(hint_vggt), layers=[1], scale_hint="depth")
    return replace(model_config, geometry=geometry)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def hint_frontend(hint_config: ModelConfig) -> Any:
    return load_frontend(hint_config)


@pytest.fixture
def batch_of(hint_frontend: Any, data_config: Any) -> Callable[..., Any]:
    def make(chosen: list[Any], **changes: Any) -> Any:
        config = data_config(**changes)
        cache = open_cache(config, changes["model"]) if "model" in changes else None
        processor = make_processor(replace(hint_frontend, cache=cache), config)
        return make_collate(hint_frontend, config)([processor(sample, True) for sample in chosen])

    return make


def code_of(features: torch.Tensor) -> torch.Tensor:
    """The code of a frame set, ``[CHANNELS]``, which all its features have."""
    codes = features[..., -CHANNELS:].flatten(0, 2)
    assert (codes == codes[0]).all()
    return codes[0]


def test_the_loader_gives_the_depth_at_patch_centres(batch_of: Any, depth_samples: list[Any]) -> None:
    batch = batch_of(depth_samples[:2])
    for sample, frames, depth in zip(
        depth_samples, batch.visuals.geometry_frames, batch.visuals.scale_reference, strict=False
    ):
        assert (
            depth.shape == (len(frames), frames.shape[2] // 14, frames.shape[3] // 14) and depth.dtype == torch.float32
        )
        measured = np.asarray(Image.open(sample.frames[0].with_suffix(".png"))) / 1000
        found = depth[0][depth[0].isfinite()]
        assert len(found) > 3 and all(np.isclose(measured, float(value), atol=1e-4).any() for value in found)
    assert (
        batch_of([replace(depth_samples[0], frames=(), cam_to_world=np.zeros((0, 4, 4)))])
        .visuals.scale_reference[0]
        .isnan()
        .all()
    )


@pytest.mark.parametrize("visual", ["images", "video"])
def test_the_hint_is_zero_at_first_and_trained(
    hint_config: ModelConfig, hint_frontend: Any, tables: Any, batch_of: Any, depth_samples: list[Any], visual: str
) -> None:
    """At initialisation the merged geometry is that without hint; the fused pass gives its weight a gradient."""
    config = RunConfig(model=hint_config, objective=objective_config())
    model = build_model(hint_config, torch.device("cpu"), 1)
    plain_geometry = replace(hint_config.geometry, scale_hint="none")
    plain = build_model(replace(hint_config, geometry=plain_geometry), torch.device("cpu"), 1)
    batch = batch_of(depth_samples[:2], visual=visual)
    features = model.encode_3d(batch.visuals)
    assert [code_of(each)[-1].item() for each in features] == [1.0, 1.0]
    expected = plain.merge(plain.encode_3d(batch.visuals))
    assert torch.equal(model.merge(features), expected)
    step = W2R2Step(model, config, Scorer(tables, hint_frontend.tokenizer, config.objective)).train()
    step(batch)[0].backward()
    weight = model.geometry_merger.scale_hint.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(0))
        counts = batch.frame_set_of_token.bincount().tolist()
        hints = [weight @ code_of(each) for each in features]
        torch.testing.assert_close(
            model.merge(features), expected + torch.cat([h.expand(n, -1) for h, n in zip(hints, counts, strict=True)])
        )
        # No hint in the 2D-only pass.
        zeros = [torch.zeros_like(each) for each in features]
        without = [torch.zeros_like(each[..., :-CHANNELS]) for each in features]
        assert torch.equal(model.merge(zeros), plain.merge(without)) and model.zero_geometry_tokens(features) is None


def test_the_hint_is_saved_with_the_merger(hint_config: ModelConfig, tmp_path: Path) -> None:
    first, second = (build_model(hint_config, torch.device("cpu"), seed) for seed in (1, 2))
    torch.nn.init.normal_(first.geometry_merger.scale_hint.weight)  # type: ignore[union-attr]
    save_file(merger_tensors(first), tmp_path / "merger.safetensors")
    load_merger(second, tmp_path / "merger.safetensors")
    own = second.geometry_merger.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in first.geometry_merger.state_dict().items())
    assert fingerprint(hint_config)["scale_hint"] == "depth"
    plain_config = replace(hint_config, geometry=replace(hint_config.geometry, scale_hint="none"))
    assert "scale_hint" not in fingerprint(plain_config)
    plain = build_model(plain_config, torch.device("cpu"), 1)
    with pytest.raises(ValueError, match=r"scale_hint\.weight"):
        load_merger(plain, tmp_path / "merger.safetensors")


def test_cached_features_have_the_hint_of_their_depth_images(
    hint_config: ModelConfig, hint_frontend: Any, data_config: Any, depth_samples: list[Any], tmp_path: Path
) -> None:
    """The key has the content of the depth images, and the option."""
    model = build_model(hint_config, torch.device("cpu"), 1)
    config = data_config(cache=str(tmp_path))
    frontend = replace(hint_frontend, cache=open_cache(config, hint_config))
    collate = make_collate(frontend, config)

    def features() -> tuple[bool, torch.Tensor]:
        batch = collate([make_processor(frontend, config)(depth_samples[0], True)])
        result = model.encode_3d(batch.visuals)[0]
        flush_writes()
        return batch.visuals.geometry_frames == (None,) == batch.visuals.scale_reference, result

    assert [features()[0], features()[0]] == [False, True]
    cached = features()[1]
    assert code_of(cached)[-1] == 1
    file = depth_samples[0].frames[0].with_suffix(".png")
    before = file.read_bytes()
    try:
        Image.fromarray(np.asarray(Image.open(file)) * 2).save(file)
        hit, other = features()
    finally:
        file.write_bytes(before)
    assert not hit and torch.equal(other[..., :-CHANNELS], cached[..., :-CHANNELS])
    assert not torch.equal(code_of(other), code_of(cached))
    plain = replace(hint_config, geometry=replace(hint_config.geometry, scale_hint="none"))
    opened = open_cache(config, plain)
    assert opened is not None and frontend.cache is not None and opened.geometry != frontend.cache.geometry


def test_a_filled_cache_has_the_hint(
    hint_config: ModelConfig, hint_frontend: Any, data_config: Any, depth_samples: list[Any], tmp_path: Path
) -> None:
    """`prepare.py geometry` stores what training would compute."""
    config = RunConfig(model=hint_config, data=data_config(cache=str(tmp_path)))
    frontend = replace(hint_frontend, cache=open_cache(config.data, hint_config))
    processor = make_processor(frontend, config.data)
    assert len(encode_all(depth_samples[:1], processor.preprocess, config, torch.device("cpu"), RankInfo())) == 1
    flush_writes()
    model = build_model(hint_config, torch.device("cpu"), 1)
    cached, computed = (
        make_collate(each, config.data)([make_processor(each, config.data)(depth_samples[0], True)]).visuals
        for each in (frontend, hint_frontend)
    )
    assert cached.geometry_frames == (None,) and computed.geometry_frames != (None,)
    found = model.encode_3d(cached)[0]
    assert torch.equal(found, model.encode_3d(computed)[0]) and code_of(found)[-1] == 1


@pytest.fixture(scope="module")
def pose_config(hint_config: ModelConfig) -> ModelConfig:
    return replace(hint_config, geometry=replace(hint_config.geometry, scale_hint="poses"))


def test_the_loader_gives_the_camera_centres(
    pose_config: ModelConfig, data_config: Any, depth_samples: list[Any], tmp_path: Path
) -> None:
    """Relative to the first one; no depth images are needed. Shuffled geometry has those of the other scene."""
    frontend = load_frontend(pose_config)
    config = data_config()
    processor, collate = make_processor(frontend, config), make_collate(frontend, config)
    (chosen,) = with_depth(tmp_path, depth_samples[:1])
    for path in chosen.frames:
        path.with_suffix(".png").unlink()
    found = processor(chosen, True).visual.scale_reference
    expected = chosen.cam_to_world[:, :3, 3] - chosen.cam_to_world[0, :3, 3]
    assert found.dtype == torch.float32 and np.abs(expected[1:]).max() > 0.1
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert torch.equal(collate([processor(chosen, True)]).visuals.scale_reference[0], found)
    empty = replace(chosen, frames=(), cam_to_world=np.zeros((0, 4, 4)))
    dummy = collate([processor(empty, True)]).visuals
    assert dummy.scale_reference[0].shape == (1, 3) and dummy.scale_reference[0].isnan().all()
    model = build_model(pose_config, torch.device("cpu"), 1)
    assert not code_of(model.encode_3d(dummy)[0]).any()
    other = replace(depth_samples[2], frames=depth_samples[2].frames[:4])
    shuffled = ShuffledGeometry(processor, frontend.geometry, [chosen, other])
    assert torch.equal(shuffled(chosen, False).visual.scale_reference, processor(other, False).visual.scale_reference)
    assert point_map_bytes(chosen.frames, config, frontend.geometry) == 4 * 4 * 3


def test_cached_features_have_the_hint_of_their_poses(
    pose_config: ModelConfig, data_config: Any, depth_samples: list[Any], tmp_path: Path
) -> None:
    """Poses times 2 are another key, whose hint is larger by log 2."""
    (chosen,) = with_depth(tmp_path / "scene", depth_samples[:1])
    config = data_config(cache=str(tmp_path))
    frontend = replace(load_frontend(pose_config), cache=open_cache(config, pose_config))
    model = build_model(pose_config, torch.device("cpu"), 1)

    def features() -> tuple[bool, torch.Tensor]:
        batch = make_collate(frontend, config)([make_processor(frontend, config)(chosen, True)])
        result = model.encode_3d(batch.visuals)[0]
        flush_writes()
        return batch.visuals.geometry_frames == (None,) == batch.visuals.scale_reference, code_of(result)

    assert [features()[0], features()[0]] == [False, True]
    first = features()[1]
    for path in chosen.frames:
        pose = np.loadtxt(path.with_suffix(".txt"))
        pose[:3, 3] *= 2
        np.savetxt(path.with_suffix(".txt"), pose)
    hit, second = features()
    assert not hit and second[0] - first[0] == pytest.approx(np.log(2), abs=1e-4) and first[-1] == 1


def test_shuffled_geometry_has_the_depth_of_the_other_scene(
    hint_frontend: Any, data_config: Any, depth_samples: list[Any]
) -> None:
    plain = make_processor(hint_frontend, data_config())
    first, second = depth_samples[0], replace(depth_samples[2], frames=depth_samples[2].frames[:4])
    shuffled = ShuffledGeometry(plain, hint_frontend.geometry, [first, second])
    assert torch.equal(
        shuffled(first, False).visual.scale_reference.nan_to_num(-1),
        plain(second, False).visual.scale_reference.nan_to_num(-1),
    )


def test_depth_images_are_checked_at_start(hint_frontend: Any, samples: list[Any], depth_samples: list[Any]) -> None:
    """Not the poses, which the hint does not use."""
    assert check_geometry_files(depth_samples[:1], "vggt", hint_frontend.geometry) == len(depth_samples[0].frames)
    with pytest.raises(ValueError, match=r"model\.geometry\.scale_hint depth needs a depth image of every frame: "):
        check_geometry_files(samples[:1], "vggt", hint_frontend.geometry)


def test_poses_are_checked_at_start(pose_config: ModelConfig, depth_samples: list[Any], tmp_path: Path) -> None:
    """Neither depth images nor intrinsics, nor the alignment of the world."""
    geometry = geometry_spec(pose_config.geometry)
    (chosen,) = with_depth(tmp_path, depth_samples[:1])
    for path in chosen.frames:
        path.with_suffix(".png").unlink()
    (chosen.frames[0].parent / "intrinsic.txt").unlink()
    shutil.rmtree(tmp_path / "scans")
    assert check_geometry_files([chosen], "vggt", geometry) == len(chosen.frames)
    chosen.frames[1].with_suffix(".txt").write_text("-inf " * 16)
    with pytest.raises(ValueError, match=r"model\.geometry\.scale_hint poses needs a camera pose .*00001\.txt"):
        check_geometry_files([chosen], "vggt", geometry)


def test_depth_counts_as_shared_memory(hint_frontend: Any, frontend: Any, data_config: Any, samples: list[Any]) -> None:
    config = data_config()
    assert point_map_bytes(samples[0].frames, config, hint_frontend.geometry) == 4 * 4 * (42 // 14) * (56 // 14)
    assert point_map_bytes(samples[0].frames, config, frontend.geometry) == 0
