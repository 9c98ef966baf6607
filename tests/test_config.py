"""The run configuration: strict, and the command line wins."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from w2r2_ds.config import RECIPES, RunConfig, from_tree, load_config, save_config

RECIPE = str(RECIPES / "scanrefer_3b.yaml")


def test_without_a_recipe_it_is_the_demo() -> None:
    assert load_config().demo.enabled


def test_a_recipe_does_not_inherit_the_demo() -> None:
    config = load_config(RECIPE)
    defaults = RunConfig()
    assert not config.demo.enabled
    assert (config.objective, config.model.lora_rank) == (defaults.objective, defaults.model.lora_rank)


def test_the_defaults_are_the_papers() -> None:
    assert (RunConfig().objective.lam, RunConfig().objective.mu) == (1.5, 0.7)


@pytest.mark.parametrize(
    "args", [["--train.steps", "5", "--config", RECIPE], ["--config", RECIPE, "--train.steps", "5"]]
)
def test_the_command_line_wins_in_any_order(args: list[str]) -> None:
    config = load_config(overrides=args)
    assert config.train.steps == 5
    assert config.model.vlm == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_an_abbreviated_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(overrides=["--conf", RECIPE])
    assert "--conf" in capsys.readouterr().err


def test_it_survives_yaml(tmp_path: Path) -> None:
    config = load_config(RECIPE, ["--objective.lam", "0.25"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_tree(asdict(config)) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["objective"]["lam"] == 0.25


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("objective.mu", "1.0"),
        ("objective.lam", "-1"),
        ("train.lr", "0"),
        ("train.steps", "0"),
        ("train.warmup", "1"),
        ("train.seed", "-1"),
        ("data.workers", "-1"),
        ("model.lora_dropout", "1"),
        ("demo.warmup_batch", "0"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option):
        load_config(overrides=[f"--{option}", value])
