"""Feature map and attention anchors of a trained run, as files."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from w2r2_ds.diagnostics import visual_tokens
from w2r2_ds.diagnostics.attention import anchors
from w2r2_ds.diagnostics.feature_map import FeatureMapOptions
from w2r2_ds.diagnostics.visual_tokens import VisualOptions, diagnose_visual_tokens

OPTIONS = VisualOptions(
    features=FeatureMapOptions(samples=4, tokens=60, perplexity=3.0, neighbours=3), samples=3, pictures=1, batch_size=2
)
"""The validation samples of the fixture share few frames, with few tokens."""


def test_parts_of_a_run(trained: Path, tmp_path: Path) -> None:
    results = diagnose_visual_tokens(trained, tmp_path, OPTIONS)
    for part in visual_tokens.PARTS:
        content = json.loads((tmp_path / f"{part}-scanrefer.json").read_text())
        assert content == json.loads(json.dumps(results[part])) and content["checkpoint"] == str(trained)
    assert results["attention"]["finished"] is True
    passes = results["attention"]["passes"]
    records = passes["fused"]["records"]
    assert set(passes) == {"2d_only", "fused"} and passes["fused"]["summary"]["samples"] == len(records)
    assert len(records) + results["attention"]["not_in_view"] == 3
    assert passes["fused"]["summary"]["target_area"] > 0 and results["attention"]["typical"]["samples"] > 0
    pictures = results["attention"]["pictures"]
    assert pictures == {records[0]["sample"]: "attention-scanrefer/000.png"}
    assert [path.name for path in (tmp_path / "attention-scanrefer").iterdir()] == ["000.png"]
    assert Image.open(tmp_path / "attention-scanrefer" / "000.png").size[0] >= 240
    layers = results["features"]["layers"]
    assert len(layers) == len(records[0]["target_mass"])
    assert 4 <= len(results["features"]["points"]["fused"]) == len(results["features"]["samples"]) <= 60


def test_an_interrupted_run_keeps_its_results(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second batch of the attention anchors: the feature map and the first batch are on disk."""
    monkeypatch.setattr(anchors, "SAVE_EVERY", 1)
    forward, batches = anchors._both_passes, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(batches) == 1:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(anchors, "_both_passes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diagnose_visual_tokens(trained, tmp_path, replace(OPTIONS, batch_size=1))
    assert json.loads((tmp_path / "features-scanrefer.json").read_text())["layers"]
    attention = json.loads((tmp_path / "attention-scanrefer.json").read_text())
    assert attention["finished"] is False and attention["passes"]["fused"]["summary"]["samples"] == 1


def test_wrong_options_raise_before_the_model_is_loaded(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anchors; choose from features, attention"):
        diagnose_visual_tokens(trained, tmp_path, VisualOptions(parts=["anchors"]))
    with pytest.raises(ValueError, match="empty"):
        diagnose_visual_tokens(trained, tmp_path, VisualOptions(parts=[]))
    assert not list(tmp_path.iterdir())


def test_attention_needs_the_training_sets(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(config: object, split: str) -> None:
        raise ValueError(f"{split} is not here")

    monkeypatch.setattr(visual_tokens, "load_mixture", missing)
    monkeypatch.setattr(visual_tokens, "trained_model", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises(ValueError, match="train is not here"):
        diagnose_visual_tokens(trained, tmp_path, VisualOptions(parts=["attention"]))
