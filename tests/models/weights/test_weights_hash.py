"""Hashes distinguish weights of models of equal sizes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from w2r2_ds.models.build import build_model, fingerprint
from w2r2_ds.models.feature_cache import geometry_identity
from w2r2_ds.models.weights import weights_hash
from w2r2_ds.models.weights.weights_hash import weights_identity
from w2r2_ds.training.checkpoint.compat import check_fingerprint


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copy(model_config: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_config.vlm, tmp_path / "vlm"))


def test_hash_is_independent_of_sharding(model_config: Any, copy: Path) -> None:
    own = weights_identity(model_config.vlm)
    assert len(own) == 16 and weights_identity(copy) == own
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    for index in range(2):
        save_file({name: tensors[name] for name in names[index::2]}, copy / f"model-{index}.safetensors")
    (copy / "model.safetensors").unlink()
    assert weights_identity(copy) == own


def test_hash_changes_with_training(model_config: Any, copy: Path) -> None:
    rewrite(copy, lambda tensors: {name: tensor * 1.01 for name, tensor in tensors.items()})
    assert weights_identity(copy) != weights_identity(model_config.vlm)


def test_a_checkpoint_of_another_model_of_equal_size_does_not_resume(model_config: Any, copy: Path) -> None:
    ours = build_model(model_config, torch.device("cpu"), 0)
    saved = ours.fingerprint
    check_fingerprint(saved, ours.fingerprint, Path("checkpoint.json"))
    rewrite(copy, lambda tensors: {name: -tensor for name, tensor in tensors.items()})
    other = build_model(type(model_config)(**{**vars(model_config), "vlm": str(copy)}), torch.device("cpu"), 0)
    with pytest.raises(ValueError, match=r"checkpoint\.json: model\.vlm_weights is '\w{16}', but"):
        check_fingerprint(saved, other.fingerprint, Path("checkpoint.json"))


def test_weights_are_read_once_per_process_and_version(
    model_config: Any, data_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint and the keys of the feature cache need the same hash of the geometry encoder."""
    folder = Path(shutil.copytree(model_config.geometry.path, tmp_path / "vggt"))
    config = replace(model_config, geometry=replace(model_config.geometry, path=str(folder)))
    opened: list[Path] = []
    monkeypatch.setattr(weights_hash, "safe_open", lambda file, **how: opened.append(file) or safe_open(file, **how))
    own_key, own = geometry_identity(data_config(), config), fingerprint(config)["geometry_identity"]
    tensors = load_file(folder / "model.safetensors")
    assert [file.parent for file in opened].count(folder) == 1 + len(tensors), "the list of names, then every tensor"
    opened.clear()
    rewrite(folder, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    assert geometry_identity(data_config(), config) != own_key and fingerprint(config)["geometry_identity"] != own
    assert [file.parent for file in opened].count(folder) == 1 + len(tensors)


def test_a_directory_without_weights_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        weights_identity(tmp_path)


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=re.escape(f"The weights in {copy} cannot be read")):
        weights_identity(copy)
