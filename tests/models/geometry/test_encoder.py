"""A geometry encoder from one file outside the package: selected by configuration, cached, trained for one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from runs import World
from w2r2_ds.config.io import DEMO_RECIPE, from_tree, load_config
from w2r2_ds.config.schema import GeometryConfig, RunConfig
from w2r2_ds.data.answer_tokens import token_tables
from w2r2_ds.data.dataset import load_mixture
from w2r2_ds.data.loader import make_collate, make_processor
from w2r2_ds.data.prepare.features import fill_cache
from w2r2_ds.models.build import VlmFrontend, build_model, fingerprint, load_frontend
from w2r2_ds.models.feature_cache import geometry_identity, open_cache
from w2r2_ds.models.frame_pixels import unit_range
from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS, geometry_spec, register_geometry_encoder
from w2r2_ds.objective.scorer import Scorer
from w2r2_ds.training.checkpoint.compat import check_fingerprint
from w2r2_ds.training.step import W2R2Step
from w2r2_ds.types.batch import Batch
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.utils import plugins
from w2r2_ds.utils.distributed import RankInfo

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parents[3] / "examples" / "custom_geometry_encoder.py"


@pytest.fixture
def config(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunConfig]]:
    """`config(**changes)` of a run with the encoder of the plug-in, whose patches are larger than the tower's."""
    monkeypatch.setattr(plugins, "IMPORTED", [])

    def make(**changes: object) -> RunConfig:
        given = {"name": "frame_difference", "path": "", "layers": [0, 2]}
        options = {f"model__geometry__{name}": value for name, value in given.items()}
        given_run = {"data__frame_width": 96, "data__workers": 0, "data__cache": tmp_path / "cache"}
        return load_config(DEMO_RECIPE, world.arguments(tmp_path / "run", **options, **given_run, **changes))

    with patch.dict(GEOMETRY_ENCODERS):
        assert plugins.import_plugins(["--plugin", str(PLUGIN)]) == []
        yield make


def batch_of(run: RunConfig, frontend: VlmFrontend) -> Batch:
    """The first two samples of the training set."""
    processor = make_processor(frontend, run.data)
    samples = list(load_mixture(run.data, "train"))[:2]
    return make_collate(frontend, run.data, False)([processor(sample, True) for sample in samples])


@pytest.mark.parametrize("visual", ["images", "video"])
def test_features_are_prepared_and_a_step_is_trained(config: Callable[..., RunConfig], visual: str) -> None:
    run = config(data__visual=visual)
    computed = load_frontend(run.model)
    fill_cache(run, ["train"], False, RankInfo())
    cached = replace(computed, cache=open_cache(run.data, run.model))
    model = build_model(run.model, torch.device("cpu"), 0)
    batches = [batch_of(run, frontend) for frontend in (computed, cached)]
    assert batches[1].visuals.geometry_frames == (None,) * len(batches[1].visuals.cached_3d)

    tokens = sum(batches[0].visuals.sizes)
    (height, width), (rows, columns) = (
        batches[0].visuals.geometry_frames[0].shape[2:],
        batches[0].visuals.grid_thw[0, 1:],
    )
    assert model.geometry.encode(unit_range(batches[0].visuals.geometry_frames[0])).shape[1:] == (
        height // 16,
        width // 16,
        6,
    )
    features = [model.encode_3d(batch.visuals) for batch in batches]
    for one, other in zip(*features, strict=True):
        assert one.shape[1:] == (rows, columns, 6) and torch.equal(one, other)
    assert len(model.merge(features[0])) == tokens

    tables = token_tables(computed.tokenizer, model.base.config.get_text_config().vocab_size)
    step = W2R2Step(model, run, Scorer(tables, computed.tokenizer, run.objective)).train()
    losses = [step(batch)[0] for batch in batches]
    losses[0].backward()
    assert torch.equal(losses[0], losses[1]) and torch.isfinite(losses[0])
    assert model.geometry_merger.ln_q.weight.shape == (6,)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.geometry_merger.mlp.parameters())


def test_a_batch_without_frames_encodes_the_dummy_image(config: Callable[..., RunConfig]) -> None:
    run = config()
    frontend = load_frontend(run.model)
    visuals = make_collate(frontend, run.data, False).dummy
    model = build_model(run.model, torch.device("cpu"), 0)
    assert len(model.merge(model.encode_3d(visuals))) == sum(visuals.sizes) > 0


def test_settings_of_the_encoder_are_in_cache_key_and_checkpoint(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()
    model = build_model(run.model, torch.device("cpu"), 0)
    saved = json.loads(json.dumps(model.fingerprint))  # as in a checkpoint's manifest
    assert set(vars(model.geometry)) == {"config", "dtype", "device", "spec"}, "the interface has no other attributes"
    check_fingerprint(saved, model.fingerprint, Path("checkpoint.json"))
    assert saved["geometry_encoder"] == "frame_difference" and saved["geometry_layers"] == [0, 2]
    assert saved["geometry_features"] == 6 and saved["geometry_patch_size"] == 16
    own = geometry_identity(run.data, run.model)
    for changes in ({"layers": [0, 1]}, {"layers": [2, 0]}, {"reference_frame": "last"}):
        other = replace(run.model, geometry=replace(run.model.geometry, **changes))
        assert geometry_identity(run.data, other) != own, changes

    encoder: Any = GEOMETRY_ENCODERS.find("frame_difference")
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "identity", classmethod(lambda cls, config: {"version": 2, "layers": 24}))
        changed = geometry_identity(run.data, run.model)
        other = replace(run.model, geometry=replace(run.model.geometry, layers=[0, 1]))
        assert own != changed != geometry_identity(run.data, other), "`layers` of the identity is not that of the key"
        model.fingerprint = fingerprint(run.model)
        with pytest.raises(ValueError, match=r"checkpoint\.json: model\.geometry_identity is"):
            check_fingerprint(saved, model.fingerprint, Path("checkpoint.json"))
    monkeypatch.setattr(encoder, "read_spec", classmethod(lambda cls, config: GeometrySpec(8, 6)))
    model.fingerprint = fingerprint(run.model)
    with pytest.raises(ValueError, match=r"checkpoint\.json: model\.geometry_patch_size is 16"):
        check_fingerprint(saved, model.fingerprint, Path("checkpoint.json"))


def test_frame_width_must_be_a_multiple_of_the_encoders_patch(config: Callable[..., RunConfig]) -> None:
    run = config()
    run.data.frame_width = 56
    with pytest.raises(ValueError, match=r"data\.frame_width is 56.*16"):
        make_processor(load_frontend(run.model), run.data)


def test_only_vggt_has_defaults_of_path_and_layers() -> None:
    vggt, other = (from_tree({"model": {"geometry": {"name": name}}}, "x").model.geometry for name in ("vggt", "other"))
    assert vggt == GeometryConfig()
    assert (other.path, other.layers) == ("", [0])
    assert GeometryConfig(name="other") == other


def test_a_name_can_be_registered_once_only() -> None:
    inherited: Any = type("Mine", (GEOMETRY_ENCODERS.find("vggt"),), {})
    with pytest.raises(ValueError, match=r"model\.geometry\.name 'vggt'"):
        register_geometry_encoder(inherited)


def test_vggt_needs_a_path() -> None:
    with pytest.raises(ValueError, match=r"'' is no directory here; correct model\.geometry\.path"):
        geometry_spec(GeometryConfig(path=""))


def test_an_unknown_encoder_raises_with_the_field_and_the_known_ones(model_config: Any) -> None:
    unknown = replace(model_config, geometry=GeometryConfig(name="depth"))
    for load in (load_frontend, lambda config: build_model(config, torch.device("cpu"), 0)):
        with pytest.raises(ValueError, match=r"model\.geometry\.name is 'depth'.*vggt.*--plugin"):
            load(unknown)
