"""Data and models of the demo: no file of the user is overwritten, and rooms are made as for the pretraining."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from w2r2_ds.config.io import load_config
from w2r2_ds.config.schema import RunConfig
from w2r2_ds.demo import assets
from w2r2_ds.demo.assets import CARD, copy_models, prepare_scenes
from w2r2_ds.models.merger_io import MERGER


def config_with(folder: Path, *words: str) -> RunConfig:
    """The demo with models in a folder."""
    return load_config(overrides=["--model.vlm", f"{folder}/vlm", "--model.merger", f"{folder}/{MERGER}", *words])


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the weights in the package."""
    folder = tmp_path / "weights"
    for pair in ("point_map", "vggt_pair"):
        (folder / pair / "vlm").mkdir(parents=True)
        for name in ("vlm/config.json", MERGER, CARD):
            (folder / pair / name).write_text(f"content of {name}")
    (folder / "vggt").mkdir()
    (folder / "vggt" / "model.safetensors").write_text("a VGGT")
    monkeypatch.setattr(assets, "WEIGHTS", folder)
    return folder


def test_models_are_copied_and_reused(weights: Path, tmp_path: Path) -> None:
    config = config_with(tmp_path / "tiny")
    copy_models(config)
    for name in ("vlm/config.json", MERGER, CARD):
        assert (tmp_path / "tiny" / name).read_text() == f"content of {name}"
    (tmp_path / "tiny" / "vlm" / "more").touch()
    copy_models(config)
    assert (tmp_path / "tiny" / "vlm" / "more").is_file(), "not copied again"
    (weights / "point_map" / CARD).write_text("other weights")
    with pytest.raises(ValueError, match="tiny exists, but is no copy"):
        copy_models(config)
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "tiny"}


def test_the_vggt_is_copied_with_its_pair(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    path = ["--model.geometry.path", f"{folder}/vggt"]
    copy_models(config_with(folder, "--demo.geometry", "vggt", *path))
    assert (folder / "vggt" / "model.safetensors").read_text() == "a VGGT"
    assert (folder / MERGER).read_text() == f"content of {MERGER}"


@pytest.mark.parametrize("words", [["--model.geometry.path", "elsewhere"], ["--model.geometry.name", "point_map"]])
def test_another_geometry_than_that_of_the_pair_raises(weights: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"demo\.geometry is vggt.*model\.geometry.*demo_vggt\.yaml"):
        copy_models(config_with(tmp_path / "tiny", "--demo.geometry", "vggt", *words))
    assert not (tmp_path / "tiny").exists()


def test_existing_models_are_not_overwritten(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "vlm").mkdir(parents=True)
    (tmp_path / "tiny" / "vlm" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="tiny exists, but is no copy"):
        copy_models(config_with(tmp_path / "tiny"))
    assert (tmp_path / "tiny" / "vlm" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    "words",
    [
        ["--model.vlm", "Qwen/Qwen2.5-VL-3B-Instruct"],
        ["--model.merger", ""],
        ["--model.merger", "elsewhere/geometry_merger.safetensors"],
    ],
)
def test_own_models_raise_instead_of_being_replaced(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.vlm.*model\.merger.*--demo.enabled false"):
        copy_models(config_with(tmp_path / "tiny", *words))
    assert not Path("Qwen").exists() and not (tmp_path / "tiny").exists()


def test_rooms_and_sets(tmp_path: Path) -> None:
    """The options of section `demo`, and those that are fixed."""
    rooms = ["--demo.train_scenes", "2", "--demo.val_scenes", "2", "--demo.seed", "0", "--data.root", str(tmp_path)]
    config = load_config(overrides=rooms)
    prepare_scenes(config)
    options = json.loads((tmp_path / "manifest.json").read_text())["options"]
    expected = {"seed": 0, "train_scenes": 2, "val_scenes": 2, "image_size": [168, 112], "frames_per_scene": 4}
    expected |= {"sentences": "phrases", "world_frame": "corner", "questions": ["unique_color"]}
    assert {name: options[name] for name in expected} == expected
    for task, decimals in (("scanrefer", 1), ("scan2cap", 1), ("scanqa", None)):
        for split in ("train", "val"):
            manifest = json.loads((tmp_path / f"prepared/{task}/{split}/manifest.json").read_text())
            assert manifest["options"].get("decimals") == decimals
            assert manifest["options"]["frames"]["count"] == 4
