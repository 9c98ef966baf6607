"""Load the configuration and the trained model of a run, a checkpoint, an exported adapter or an imported VG-LLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from w2r2_ds.config.io import load_config, relocated
from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.convert.from_vgllm import MODEL_OPTIONS
from w2r2_ds.convert.peft_adapter import ADAPTER_CARD, adapter_config, load_adapter
from w2r2_ds.models.build import VlmFrontend, build_model, fingerprint
from w2r2_ds.models.feature_cache import open_cache
from w2r2_ds.models.merger_io import MERGER
from w2r2_ds.models.w2r2 import W2R2
from w2r2_ds.training.checkpoint.compat import check_fingerprint, warn_of_changed_plugins
from w2r2_ds.training.checkpoint.manifest import MANIFEST, TENSORS, find_checkpoint, read_manifest
from w2r2_ds.training.checkpoint.weights import load_trainable
from w2r2_ds.utils.files.hashing import files_sha256


def run_config(
    path: Path, root: str | Path | None = None, vlm: str | None = None, geometry_path: str | None = None
) -> RunConfig:
    """Configuration of a run, a checkpoint, an exported adapter or an imported VG-LLM.

    An imported VG-LLM (``w2r2 convert from-vgllm``) has model options only; all others are defaults.

    Args:
        path: folder of the run, checkpoint, adapter or import.
        root: data root on this machine; None for the one of training.
        vlm: directory or hub id of the VLM on this machine; None for the one of training.
        geometry_path: directory or hub id of the geometry encoder on this machine; None for the one of training.

    Raises:
        ValueError: the folder has no complete checkpoint and no adapter, or its configuration is not valid.
    """
    if (path / ADAPTER_CARD).is_file():
        return relocated(adapter_config(path), root, vlm, geometry_path)
    if (path / MODEL_OPTIONS).is_file():
        # The paths in the file are those of the import; the folder may have been moved since.
        parts = vlm or str(path / "vlm"), geometry_path or str(path / "vggt")
        config = relocated(load_config(path / MODEL_OPTIONS), root, *parts)
        return replace(config, model=replace(config.model, merger=str(path / MERGER)))
    return relocated(load_config(find_checkpoint(path) / "config.yaml"), root, vlm, geometry_path)


def trained_model(path: Path, config: RunConfig) -> W2R2:
    """Load the trained model, on this process's device and in evaluation mode.

    Args:
        path: folder of the run, checkpoint, adapter or import.
        config: its configuration, from `run_config`.

    Raises:
        ValueError: it was trained with other base models, or a file is missing or broken.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (path / ADAPTER_CARD).is_file():
        model = load_adapter(path, config, device)
    elif (path / MODEL_OPTIONS).is_file():
        model = build_model(config.model, device, config.train.seed)  # its LoRA is zero: the imported weights
    else:
        checkpoint = find_checkpoint(path)
        # Before gigabytes are loaded.
        manifest = read_manifest(checkpoint)
        warn_of_changed_plugins(manifest, checkpoint)
        check_fingerprint(manifest["model"], fingerprint(config.model), checkpoint / MANIFEST)
        model = build_model(config.model, device, config.train.seed)
        load_trainable(checkpoint, model)
    return model.to(device).eval()


class LoadOnce:
    """Loads a trained model at the first call and keeps it for the following evaluations."""

    def __init__(self) -> None:
        self._model: W2R2 | None = None
        self._of: tuple[Path, ModelConfig] | None = None

    def __call__(self, path: Path, config: RunConfig) -> W2R2:
        """The model of `path`; every call must be of the same one."""
        if self._model is None:
            self._model, self._of = trained_model(path, config), (path, config.model)
        assert self._of == (path, config.model), "all evaluations are of one model"
        return self._model


def trained_weights_sha256(path: Path) -> str:
    """SHA-256 of the files of trained tensors; of an imported VG-LLM, of its merger (the fingerprint has the rest)."""
    if (path / ADAPTER_CARD).is_file():
        return files_sha256(path.glob("*.safetensors"), path)
    if (path / MODEL_OPTIONS).is_file():
        return files_sha256([path / MERGER], path)
    checkpoint = find_checkpoint(path)
    return files_sha256([checkpoint / TENSORS], checkpoint)


def with_cache(frontend: VlmFrontend, config: RunConfig) -> VlmFrontend:
    """The frontend with the run's feature cache if the folder exists on this machine; evaluation creates no cache."""
    exists = config.data.cache and Path(config.data.cache).is_dir()
    return replace(frontend, cache=open_cache(config.data, config.model) if exists else None)
