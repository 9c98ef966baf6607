"""Load a trained model with its configuration and frontend."""

from __future__ import annotations

from pathlib import Path

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.evaluation.loading import run_config, trained_model
from w2r2_ds.models.build import VlmFrontend, load_frontend
from w2r2_ds.models.w2r2 import W2R2


def load_trained_model(path: Path) -> tuple[RunConfig, W2R2, VlmFrontend]:
    """Configuration, model and frontend of a run, a checkpoint or an exported adapter."""
    config = run_config(path)
    return config, trained_model(path, config), load_frontend(config.model)
