"""`build_run`: user errors are one line and are raised before any weights are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from prepared_sets import write_prepared
from runs import ZERO3, World
from w2r2_ds.config.io import DEMO_RECIPE, load_config, save_config
from w2r2_ds.data.dataset import digests, load_mixture
from w2r2_ds.data.prepared_set import PreparedSet
from w2r2_ds.evaluation.validator import AnswerValidation
from w2r2_ds.models.build import fingerprint
from w2r2_ds.training import build
from w2r2_ds.training.checkpoint.manifest import step_folder, write_manifest


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one rank; building the model raises AssertionError."""

    def fail(*_: Any) -> None:
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(build, "build_model", fail)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build_error(world: World, out: Path, ds: Path = ZERO3, **changes: object) -> str:
    """The error of `build_run` with the given options."""
    with pytest.raises(ValueError) as caught:
        build.build_run(load_config(DEMO_RECIPE, world.arguments(out, **changes)), str(ds), AnswerValidation)
    message = str(caught.value)
    assert "\n" not in message and not out.exists()
    return message


@pytest.mark.parametrize(("width", "vggt", "vlm"), [(56, "56 x 42", "56 x 28"), (126, "126 x 98", "112 x 84")])
def test_the_frame_sizes_of_both_encoders_are_logged(
    world: World, tmp_path: Path, one_process: None, caplog: pytest.LogCaptureFixture, width: int, vggt: str, vlm: str
) -> None:
    caplog.set_level("INFO", "w2r2_ds")
    with pytest.raises(AssertionError, match="the weights are loaded"):
        build.build_run(
            load_config(DEMO_RECIPE, world.arguments(tmp_path / "out", data__frame_width=width)),
            str(ZERO3),
            AnswerValidation,
        )
    assert f"frames {vggt} for the geometry encoder, {vlm} for the vision tower (of scene0000_00|" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__vlm": "/nowhere"}, "model '/nowhere' is no directory here; correct model.vlm"),
        ({"model__geometry__path": "/nowhere"}, "'/nowhere' is no directory here; correct model.geometry.path"),
        (
            {"model__geometry__path": "no-such-org/no-such-vggt"},
            "; correct model.geometry.path (or --geometry_path), or fetch it",
        ),
        (
            {"data__max_length": 100},
            "more than data.max_length = 100; raise it or use fewer or smaller frames (also scene",
        ),
        (
            {"data__frame_width": 60},
            "data.frame_width is 60; make it a multiple of the geometry encoder's patch size 14.",
        ),
    ],
)
def test_wrong_options_raise(
    world: World, tmp_path: Path, one_process: None, changes: dict[str, object], said: str
) -> None:
    assert said in build_error(world, tmp_path / "out", **changes)


def write_checkpoint(world: World, out: Path, **changes: object) -> None:
    """Manifest and configuration of a checkpoint of the run; `changes` of the manifest."""
    config = load_config(DEMO_RECIPE, world.arguments(out))
    checkpoint = step_folder(out, 10)
    checkpoint.mkdir(parents=True)
    save_config(config, checkpoint / "config.yaml")
    manifest = {
        "world_size": 1,
        "zero_stage": 3,
        "model": fingerprint(config.model),
        "data": digests(load_mixture(config.data, "train")),
    }
    write_manifest(checkpoint, manifest | changes, {})


@pytest.mark.parametrize(
    ("saved", "changes", "names"),
    [
        ({}, {"model__lora_rank": 3}, ["model.lora_rank", "checkpoint.json"]),
        ({}, {"model__fusion": "gated"}, ["model.fusion", "checkpoint.json"]),
        ({}, {"train__merger_lr": 2e-5}, ["train.merger_lr", "config.yaml"]),
        ({}, {"train__seed": 5}, ["train.seed", "config.yaml"]),
        ({}, {"objective__mu": 0.5}, ["objective.mu", "config.yaml"]),
        ({}, {"data__frame_width": 112}, ["data.frame_width", "config.yaml"]),
        ({}, {"data__train": "[{path: prepared/scanrefer/val}]"}, ["data.train", "config.yaml"]),
        ({"model": {"vlm_weights": "0"}}, {}, ["model.vlm_weights", "checkpoint.json"]),
        ({"data": ["of other samples"]}, {}, ["prepared/scanrefer/train"]),
        ({"zero_stage": 2}, {}, ["ZeRO stage 2"]),
        ({"zero_stage": 0, "world_size": 2}, {}, ["without ZeRO"]),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_an_error_before_the_weights(
    world: World,
    tmp_path: Path,
    one_process: None,
    saved: dict[str, object],
    changes: dict[str, object],
    names: list[str],
) -> None:
    write_checkpoint(world, tmp_path, **saved)
    config = load_config(DEMO_RECIPE, world.arguments(tmp_path, resume="auto", **changes))
    with pytest.raises(ValueError, match=re.escape(names[0])) as caught:
        build.build_run(config, str(ZERO3), AnswerValidation)
    assert all(name in str(caught.value) for name in names) and "\n" not in str(caught.value)


def test_a_resumed_run_builds_its_model_with_the_kernels_of_the_checkpoint(
    world: World, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {"names": ["swiglu"], "device": "GPU A"}
    write_checkpoint(world, tmp_path, kernels=kernels)
    passed: list[Any] = []

    def built(*arguments: Any) -> None:
        passed.extend(arguments)
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(build, "build_model", built)
    with pytest.raises(AssertionError, match="the weights are loaded"):
        config = load_config(DEMO_RECIPE, world.arguments(tmp_path, resume="auto"))
        build.build_run(config, str(ZERO3), AnswerValidation)
    assert passed[-1] == kernels


def test_a_wrong_deepspeed_json_raises(world: World, tmp_path: Path, one_process: None) -> None:
    said = build_error(world, tmp_path / "out", tmp_path / "none.json")
    assert said.startswith(f"{tmp_path}/none.json ") and "--deepspeed" in said
    assert "ds_configs/zero3.json" in said
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_siz": 1}}))
    assert "(did you mean zero_optimization.sub_group_size?" in build_error(world, tmp_path / "out", file)


@pytest.mark.parametrize(("kept", "weight"), [(0, 1.0), (3, 0.1)])
def test_an_empty_epoch_raises(world: World, tmp_path: Path, one_process: None, kept: int, weight: float) -> None:
    root = world.folder / "scenes"
    samples = PreparedSet(root / "prepared" / "scanrefer" / "train", root)[:kept]
    folder = tmp_path / "few"
    write_prepared(folder, samples, root)
    said = build_error(world, tmp_path / "out", data__train=f"[{{path: {folder}, weight: {weight}}}]")
    assert f"{folder}/manifest.json ({kept})" in said and "data.train" in said
