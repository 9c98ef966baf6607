"""The run configuration: strict, and the command line wins."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from w2r2_ds.config.io import RECIPES, from_tree, load_config, parser, save_config
from w2r2_ds.config.schema import RunConfig, SourceConfig

RECIPE = str(RECIPES / "scanrefer_3b.yaml")


def test_without_a_recipe_it_is_the_demo() -> None:
    assert load_config().demo.enabled


def test_a_recipe_does_not_inherit_the_demo() -> None:
    config = load_config(RECIPE)
    defaults = RunConfig()
    assert not config.demo.enabled
    assert (config.objective.mu, config.model.lora_rank) == (defaults.objective.mu, defaults.model.lora_rank)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.out.startswith("runs/") and config.data.val


def test_help_lists_every_option_with_its_default_and_a_sentence() -> None:
    text = " ".join(parser("", with_demo=False).format_help().split())
    defaults = asdict(RunConfig())
    sections = {name: value for name, value in defaults.items() if isinstance(value, dict)}
    options = [(f"{section}.{field}", value) for section, fields in sections.items() for field, value in fields.items()]
    options += [(name, value) for name, value in defaults.items() if name not in sections]
    for name, value in options:
        flag = f" --{name}+ " if isinstance(value, list) else f" --{name} "  # a list can be appended to
        said = text.split(flag)[-1].split(" --")[0]
        assert f"default: {value})" in said, name
        assert re.search(r" \w+ .*\w+.*\. \(type", said), f"{name} has no sentence: {said}"


def test_the_defaults_are_the_papers() -> None:
    assert (RunConfig().objective.lambda_det, RunConfig().objective.mu) == (1.5, 0.7)


@pytest.mark.parametrize(
    "args", [["--train.steps", "5", "--config", RECIPE], ["--config", RECIPE, "--train.steps", "5"]]
)
def test_the_command_line_wins_in_any_order(args: list[str]) -> None:
    config = load_config(overrides=args)
    assert config.train.steps == 5
    assert config.model.vlm == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_mixture_is_named_on_the_command_line() -> None:
    config = load_config(overrides=["--data.train", "[{path: a, weight: 0.5}, {path: b, cap: 7}]"])
    assert config.data.train == [SourceConfig("a", weight=0.5), SourceConfig("b", cap=7)]
    assert config.data.val == load_config().data.val


@pytest.mark.parametrize(
    ("sources", "message"),
    [("[]", "names? at least one"), ("[{path: a, weight: 0}]", "a has weight 0"), ("[{path: a, cap: -1}]", "cap -1")],
)
def test_a_mixture_that_shows_nothing_is_refused(sources: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(overrides=["--data.train", sources])


def test_an_abbreviated_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(overrides=["--conf", RECIPE])
    assert "--conf" in capsys.readouterr().err


def test_it_survives_yaml(tmp_path: Path) -> None:
    config = load_config(RECIPE, ["--objective.lambda_det", "0.25"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_tree(asdict(config)) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["objective"]["lambda_det"] == 0.25


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("objective.mu", "1.0"),
        ("objective.lambda_det", "-1"),
        ("objective.margin", "-1"),
        ("objective.cosine", "1.5"),
        ("objective.visual_mask_ratio", "1"),
        ("objective.gap_every", "-1"),
        ("objective.gap_samples", "0"),
        ("train.lr", "0"),
        ("train.steps", "0"),
        ("train.warmup_ratio", "1"),
        ("train.seed", "-1"),
        ("data.workers", "-1"),
        ("data.cache_gib", ".inf"),
        ("data.cached_features", "geometry+2d"),
        ("model.lora_dropout", "1"),
        ("demo.warmup_batch", "0"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option):
        load_config(overrides=[f"--{option}", value])
