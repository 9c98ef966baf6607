"""Plug-ins of a checkpoint: their code is recorded, and a change is logged."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from w2r2_ds.config.schema import RunConfig
from w2r2_ds.training.checkpoint import save
from w2r2_ds.training.checkpoint.compat import warn_of_changed_plugins
from w2r2_ds.training.checkpoint.save import CheckpointInfo
from w2r2_ds.utils import plugins


def test_a_changed_plugin_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The manifest has the hashes of all plug-ins. A file that was moved is the same plug-in."""
    first, second = tmp_path / "first.py", tmp_path / "elsewhere" / "first.py"
    second.parent.mkdir()
    for file in (first, second):
        file.write_text("A = 1\n")
    monkeypatch.setattr(plugins, "IMPORTED", [])
    plugins.import_plugin(str(first))
    monkeypatch.setattr(save.dist, "get_world_size", lambda: 1)
    model = SimpleNamespace(fingerprint={}, kernels=frozenset())
    engine: Any = SimpleNamespace(module=SimpleNamespace(model=model), device="cpu", zero_optimization_stage=lambda: 3)
    config, token = RunConfig(), SimpleNamespace(number=1)
    config.model.kernels = "torch"
    manifest = save.build_manifest(engine, config, CheckpointInfo(step=10, metrics={}, data=[]), token)  # type: ignore[arg-type]
    assert list(manifest["plugins"]) == [str(first)]
    monkeypatch.setattr(plugins, "IMPORTED", [])
    plugins.import_plugin(str(second))
    with caplog.at_level(logging.WARNING):
        warn_of_changed_plugins(manifest, tmp_path / "step")
        warn_of_changed_plugins({}, tmp_path / "step")
        assert not caplog.records
        second.write_text("A = 2\n")
        plugins.import_plugin(str(second))
        warn_of_changed_plugins(manifest, tmp_path / "step")
    (record,) = caplog.records
    assert str(second) in record.getMessage() and str(tmp_path / "step") in record.getMessage()
