"""Keys of the feature cache depend on everything that changes features; errors of missing weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from w2r2_ds.config.schema import GeometryConfig, ModelConfig
from w2r2_ds.models import feature_cache
from w2r2_ds.models.feature_cache import geometry_identity, open_cache, vision_identity
from w2r2_ds.models.geometry.encoder import GEOMETRY_ENCODERS
from w2r2_ds.models.qwen2_5_vl.family import Qwen25VL
from w2r2_ds.models.vggt.encoder import VGGTEncoder
from w2r2_ds.models.weights.weights_hash import model_weights
from w2r2_ds.types.geometry import GeometrySpec
from w2r2_ds.utils import plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_geometry_encoder.py"


def copy_with(folder: str, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A model directory with other weights."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_keys_depend_on_the_code_of_plugins(
    model_config: ModelConfig, data_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides what `identity` of the encoder returns. The keys of built-in encoders have no code."""
    monkeypatch.setattr(plugins, "IMPORTED", [])
    file, data = tmp_path / "encoder.py", data_config()
    shutil.copy(EXAMPLE, file)
    own = replace(model_config, geometry=GeometryConfig(name="frame_difference"))
    with patch.dict(GEOMETRY_ENCODERS):
        plugins.import_plugin(str(file))
        before = geometry_identity(data, own), geometry_identity(data, model_config)
        file.write_text(file.read_text() + "# edited\n")
        plugins.import_plugin(str(file))
        after = geometry_identity(data, own), geometry_identity(data, model_config)
    assert after[0] != before[0] and after[1] == before[1]
    vision = vision_identity(data, model_config)
    monkeypatch.setattr(feature_cache, "source_sha256", lambda extension: "a")
    assert vision_identity(data, model_config) != vision


def test_keys_depend_on_everything_that_changes_features(
    model_config: ModelConfig, data_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].flatten()[-1:].view(torch.int32).bitwise_xor_(1)

        return change

    data = data_config()
    names = load_file(Path(model_config.vlm) / "model.safetensors")
    tower = next(name for name in names if name.startswith(("visual.", "model.visual.")))
    text = next(name for name in names if "visual" not in name)
    vggt = copy_with(model_config.geometry.path, tmp_path / "vggt", one_bit("aggregator.global_blocks.1.mlp.fc2.bias"))
    other_tower = copy_with(model_config.vlm, tmp_path / "tower", one_bit(tower))
    other_text = copy_with(model_config.vlm, tmp_path / "text", one_bit(text))

    own_3d, own_2d = geometry_identity(data, model_config), vision_identity(data, model_config)
    wider, video = data_config(frame_width=112), data_config(visual="video")
    padded = data_config(frame_fit="pad")
    assert geometry_identity(padded, model_config) != own_3d and vision_identity(padded, model_config) != own_2d
    assert len({own_3d, own_2d, geometry_identity(wider, model_config), vision_identity(wider, model_config)}) == 4
    assert geometry_identity(data, replace(model_config, dtype="bfloat16")) != own_3d
    for changes in ({"path": vggt}, {"layers": [0]}, {"reference_frame": "last"}):
        other = replace(model_config, geometry=replace(model_config.geometry, **changes))  # type: ignore[arg-type]
        assert geometry_identity(data, other) != own_3d, changes
    for changes in ({"vlm": other_tower}, {"attention": "eager"}, {"dtype": "bfloat16"}):
        assert vision_identity(data, replace(model_config, **changes)) != own_2d, changes  # type: ignore[arg-type]
    assert vision_identity(video, model_config) != own_2d
    assert vision_identity(data, replace(model_config, attention="auto")) == own_2d  # sdpa, without a GPU
    assert vision_identity(data, replace(model_config, kernels="triton")) == own_2d
    for owner, field, value in (
        (VGGTEncoder, "read_spec", classmethod(lambda cls, config: GeometrySpec(16, 64))),  # the size of the frames
        (Qwen25VL, "features_version", 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, field, value)
            assert vision_identity(data, model_config) != own_2d, field
    # Not in the keys: the language model's weights, the path of a model, options of training.
    assert vision_identity(data, replace(model_config, vlm=other_text, lora_rank=7)) == own_2d
    assert geometry_identity(video, replace(model_config, vlm=other_text, fusion="gated")) == own_3d


def test_a_model_without_vision_tower_weights_raises(
    model_config: ModelConfig, data_config: Any, tmp_path: Path
) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "visual" in name]:
            del tensors[name]

    vlm = copy_with(model_config.vlm, tmp_path / "vlm", without)
    with pytest.raises(ValueError, match=r"holds the weights of the encoder whose features are to be cached; copy"):
        vision_identity(data_config(), replace(model_config, vlm=vlm))


def test_truncated_weights_raise(model_config: ModelConfig, data_config: Any, tmp_path: Path) -> None:
    sources = {"vlm": model_config.vlm, "geometry": model_config.geometry.path}
    for identity, field in ((vision_identity, "vlm"), (geometry_identity, "geometry")):
        folder = Path(shutil.copytree(sources[field], tmp_path / field))
        torn = folder / "model.safetensors"
        torn.write_bytes(torn.read_bytes()[:-100])
        with pytest.raises(
            ValueError, match=r"The weights in .*model\.safetensors cannot be read \(.*\); fetch or copy"
        ):
            geometry = replace(model_config.geometry, path=str(folder))
            changes: dict[str, Any] = {"vlm": str(folder)} if field == "vlm" else {"geometry": geometry}
            identity(data_config(), replace(model_config, **changes))


def test_weights_of_a_hub_id_are_downloaded(model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first run the hub's cache has only the small files."""
    requested: list[Any] = []

    def fetch(name: str, **given: Any) -> str:
        requested.append(name)
        return model_config.vlm

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert (
        model_weights("Qwen/some-vlm")
        == [Path(model_config.vlm) / "model.safetensors"]
        == model_weights(model_config.vlm)
    )
    assert requested == ["Qwen/some-vlm"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **given: 1 / 0)
    with pytest.raises(ValueError, match=r"weights of Qwen/some-vlm could not be fetched"):
        model_weights("Qwen/some-vlm")


def test_folder_that_cannot_be_created(model_config: ModelConfig, data_config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache is .*/file/cache, which cannot be created \(.*\); name another"):
        open_cache(data_config(cache=str(tmp_path / "file" / "cache")), model_config)
    assert open_cache(data_config(), model_config) is None
