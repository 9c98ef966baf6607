"""The work folder of the pretraining."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from w2r2_ds.demo.pretraining.pair.encoders import geometry_config
from w2r2_ds.demo.pretraining.pair.run import check_settings, run_stages
from w2r2_ds.demo.pretraining.pair.settings import Settings


def test_stages_of_other_settings_are_not_loaded(tmp_path: Path) -> None:
    check_settings(tmp_path, asdict(Settings()))
    check_settings(tmp_path, asdict(Settings()))
    for _ in range(2):  # the settings of the folder stay
        with pytest.raises(ValueError, match=f"{tmp_path}.*seed and dense_steps"):
            run_stages(tmp_path, replace(Settings(), seed=1, dense_steps=3), geometry_config("point_map"))
    with pytest.raises(ValueError, match=f"{tmp_path}.*vggt"):
        run_stages(tmp_path, Settings(), geometry_config("vggt"))
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"], "nothing is rendered"
