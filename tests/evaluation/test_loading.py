"""Loading a trained model: what is logged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from w2r2_ds.config.schema import ModelConfig, RunConfig
from w2r2_ds.evaluation import loading


def test_the_chosen_attention_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(loading, "read_manifest", lambda checkpoint: {"model": {}})
    for name in ("check_fingerprint", "fingerprint", "load_trainable"):
        monkeypatch.setattr(loading, name, lambda *_: None)
    monkeypatch.setattr(loading, "build_model", lambda *_: torch.nn.Identity())
    with caplog.at_level("INFO", logger=loading.logger.name):
        loading.trained_model(tmp_path, RunConfig(model=ModelConfig(attention="auto")))
    (line,) = caplog.messages
    assert line.startswith("attention: ") and "model.attention auto: " in line
