"""The command of the pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from w2r2_ds.config.schema import GeometryConfig
from w2r2_ds.demo.pretraining import __main__ as command
from w2r2_ds.demo.pretraining.pair.settings import SETTINGS, Settings


@pytest.mark.parametrize(("words", "seed"), [([], 0), (["--seed", "3"], 3)])
def test_the_seed_is_that_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], seed: int
) -> None:
    """All other settings are those of the recipe."""
    used: list[Settings] = []

    def stop(work: Path, settings: Settings, geometry: GeometryConfig) -> Any:
        used.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_stages", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--work", str(tmp_path), "--out", str(tmp_path), "--threads", "1", *words])
    assert used == [replace(SETTINGS["point_map"], seed=seed)]
