"""The demo's stand-ins never take the place of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2r2_ds.config import load_config
from w2r2_ds.demo import prepare_models


def test_it_does_not_build_a_tiny_model_under_another_name() -> None:
    config = load_config(overrides=["--model.vlm", "Qwen/Qwen2.5-VL-3B-Instruct"])
    with pytest.raises(ValueError, match=r"Qwen/Qwen2.5-VL-3B-Instruct.*--demo.enabled false"):
        prepare_models(config)
    assert not Path("Qwen").exists()


@pytest.mark.parametrize("present", ["vlm", "vggt"])
def test_it_does_not_overwrite_models_it_did_not_make(tmp_path: Path, present: str) -> None:
    (tmp_path / present).mkdir()
    (tmp_path / present / "config.json").write_text("{}")
    args = ["--model.vlm", str(tmp_path / "vlm"), "--model.vggt", str(tmp_path / "vggt")]
    with pytest.raises(ValueError, match="was not made with these"):
        prepare_models(load_config(overrides=args))
    assert (tmp_path / present / "config.json").read_text() == "{}"
